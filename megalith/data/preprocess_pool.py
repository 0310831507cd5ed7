"""Who runs the parts: processes of this machine, or Ray workers of many. Each engine is `engine(job, parts, workers) -> records`."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import Any

from megalith.common.errors import DataError
from megalith.common.registry import Registry
from megalith.data.preprocess_part import Job, PartEncoder
from megalith.data.readers import Part
from megalith.data.tokenizers import optional_import

ENGINES = Registry("engine", {"processes": "megalith.data.preprocess_pool:run_processes", "ray": "megalith.data.preprocess_pool:run_ray"})


class Worker:
    """The encoder of one worker process."""

    encoder: PartEncoder

    @classmethod
    def start(cls, job: Job) -> None:
        """Load the encoder, and see to it that this process ends when the parent does, even by kill -9."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        parent = multiprocessing.parent_process()
        if parent is not None:
            threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        cls.encoder = PartEncoder(job)

    @classmethod
    def run(cls, part: Part) -> dict:
        """Encode one part."""
        return cls.encoder(part)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def run_processes(job: Job, parts: Iterator[Part], workers: int) -> Iterator[dict]:
    """Records of the parts as they finish, from `workers` fresh processes (a fork would copy the encoder's dead threads)."""
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
            raise DataError(
                "a worker process ended without a word (killed, or out of memory); run the same command again and it goes on "
                "with the parts that are missing, or use fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_ray(job: Job, parts: Iterator[Part], workers: int) -> Iterator[dict]:
    """Records of the parts as they finish, from `workers` actors on a Ray cluster whose nodes see the same input and output folders."""
    ray: Any = optional_import("ray", "ray", "--engine ray")
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
    actor = ray.remote(num_cpus=1)(PartEncoder)
    free = [actor.remote(job) for _ in range(workers)]
    busy: dict[Any, Any] = {}
    try:
        for part in parts:
            if not free:
                yield from _collect(ray, busy, free)
            worker = free.pop()
            busy[worker.__call__.remote(part)] = worker
        while busy:
            yield from _collect(ray, busy, free)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        for worker in free + list(busy.values()):
            ray.kill(worker)


def _collect(ray: Any, busy: dict, free: list) -> list[dict]:
    ready, _ = ray.wait(list(busy), num_returns=1)
    free += [busy.pop(reference) for reference in ready]
    return ray.get(ready)
