"""The engines that run the parts: processes of this machine, or Ray workers of many.

Each engine is a function `engine(job, parts, workers) -> records`. A job is a picklable object whose `worker()` gives
what handles a part: `data preprocess` and the steps of curation/ have one each.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from megalith.common.environment import ray_address
from megalith.common.errors import DataError
from megalith.common.extras import require
from megalith.common.registry import Registry

ENGINES = Registry(
    "engine",
    {
        "processes": "megalith.data.corpus.preprocess_pool:run_processes",
        "ray": "megalith.data.corpus.preprocess_pool:run_ray",
        "inline": "megalith.data.corpus.preprocess_pool:run_inline",
    },
)
LOST_WORKER = (
    "a worker process ended without an error message (killed, or out of memory); "
    "run the same command again, which resumes with the parts that are missing, or use fewer --workers"
)


class Job(Protocol):
    """What the workers of an engine are given, pickled."""

    def worker(self) -> Callable[[Any], dict]:
        """What makes the record of a part; called once in each worker, to load what all parts need."""


class Worker:
    """What one worker process does with a part."""

    handle: Callable[[Any], dict]
    # What `start` raised; `run` raises it, because the pool would report a worker that ends in `start` as killed, and
    # print its traceback.
    failure: Exception | None = None

    @classmethod
    def start(cls, job: Job) -> None:
        """Load what the job needs, and make this process end when its parent does, even by kill -9."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        parent = multiprocessing.parent_process()
        if parent is not None:
            threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
        try:
            cls.handle = staticmethod(job.worker())
        except Exception as error:
            cls.failure = error

    @classmethod
    def run(cls, part: Any) -> dict:
        """The record of one part. Raises what the start of this process raised."""
        if cls.failure is not None:
            raise cls.failure
        return cls.handle(part)


def _exit_with_parent(parent: Any) -> None:
    parent.join()
    os._exit(1)


def run_processes(job: Job, parts: Iterator[Any], workers: int) -> Iterator[dict]:
    """Records of the parts as they finish, from `workers` spawned processes (0: one for each core).

    They are not forked: a fork would copy the encoder's threads, dead.
    """
    workers = workers or os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, Worker.start, (job,)) as pool:
        waiting: set[concurrent.futures.Future] = set()
        try:
            for part in parts:
                waiting.add(pool.submit(Worker.run, part))
                if len(waiting) > workers:  # one ahead: blocks of a compressed stream are held in memory
                    done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            for future in concurrent.futures.as_completed(waiting):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise DataError(LOST_WORKER) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_inline(job: Job, parts: Iterator[Any], workers: int) -> Iterator[dict]:
    """Records of the parts, one after another in this process: to debug, and for inputs too small for processes."""
    handle = job.worker()
    return (handle(part) for part in parts)


class RayWorker:
    """What one actor does with a part."""

    def __init__(self, job: Job):
        """Load what the job needs."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.handle = job.worker()

    def run(self, part: Any) -> dict:
        """The record of one part."""
        return self.handle(part)


def run_ray(job: Job, parts: Iterator[Any], workers: int) -> Iterator[dict]:
    """Records of the parts as they finish, from `workers` actors on a Ray cluster (0: one for each of its cores).

    Its nodes have megalith installed and see the same input and output folders. RAY_ADDRESS says which cluster;
    without it, this machine. A job whose `gpus` is true has a GPU for each actor, where the cluster has some.
    """
    ray: Any = require("ray", "--engine ray")
    if not ray.is_initialized():
        ray.init(address=ray_address(), log_to_driver=False)
    there = ray.cluster_resources()
    places, gpus = max(1, int(there.get("CPU", 1))), int(there.get("GPU", 0)) if getattr(job, "gpus", False) else 0
    if gpus:  # an actor that asks for none is shown none
        places = min(places, gpus)
    actor = ray.remote(num_cpus=1, num_gpus=min(1, gpus), scheduling_strategy="SPREAD")(RayWorker)
    free = [actor.remote(job) for _ in range(min(workers or places, places))]
    busy: dict[Any, Any] = {}
    try:
        for part in parts:
            if not free:
                yield from _collect(ray, busy, free)
            worker = free.pop()
            busy[worker.run.remote(part)] = worker
        while busy:
            yield from _collect(ray, busy, free)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayActorError as error:
        raise DataError(f"{LOST_WORKER} ({error})") from error
    finally:
        for worker in free + list(busy.values()):
            ray.kill(worker)


def _collect(ray: Any, busy: dict, free: list) -> list[dict]:
    """Records of the parts that are done, at least one; their actors are free again."""
    ready, _ = ray.wait(list(busy), num_returns=1)
    free += [busy.pop(reference) for reference in ready]
    return ray.get(ready)
