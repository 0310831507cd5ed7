"""One rank of the pool in ranks.py: waits for a function, runs it inside a gloo group, answers with its result."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import io
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

MAX_THREADS = 60  # a rank with more threads is replaced


class Job(NamedTuple):
    """What a rank receives. `call` is a pickled (function, arguments), unpickled later, so that errors are answers."""

    rank: int
    world_size: int
    store: str
    timeout: float
    path: list[str]
    call: bytes


class Answer(NamedTuple):
    """What a rank answers: a pickled value, or an error with its traceback as text and its moment.

    error: None where it cannot be pickled. moment: time.monotonic(), one clock for all processes of a machine. It finds
    the first of several errors: the other ranks fail too, when the sockets of the first close. retire: this rank is to
    be replaced.
    """

    value: bytes
    error: BaseException | None = None
    traceback: str = ""
    moment: float = 0.0
    retire: bool = False


class _Pickler(pickle.Pickler):
    """Sends tensors as copies: without the rest of a view's storage, and without shared memory to be kept alive."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, DTensor):
            raise TypeError(
                "a rank returned a DTensor, which means nothing outside its process group; "
                "return .full_tensor() or .to_local()"
            )
        if isinstance(obj, torch.Tensor):
            copy = obj.detach().cpu().clone(memory_format=torch.contiguous_format)
            return copy.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def serve(connection: Connection, stacks: str) -> None:
    """Answer jobs until the pool closes its end. SIGUSR1 writes the stacks of all threads to the file `stacks`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who closes this process
    torch.set_num_threads(1)
    gc.freeze()  # the collection after each call then skips what the fork server has imported
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        while True:
            try:
                job = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                return
            answer = _answer(job)
            connection.send_bytes(pickle.dumps(answer._replace(retire=answer.retire or _should_retire())))


def _should_retire() -> bool:
    """Whether this process has so many threads that a new process is cheaper than its slow calls.

    Every process group has three, some of which wake all the time, and torch's hooks on parameters keep groups alive.
    """
    tasks = "/proc/self/task"  # Linux only; elsewhere ranks never retire
    return os.path.isdir(tasks) and len(os.listdir(tasks)) > MAX_THREADS


def _answer(job: Job) -> Answer:
    try:
        sys.path[:] = job.path
        with _group(job):
            return _call(job)
    except BaseException as error:
        # torch names process groups by a count that includes those whose initialization failed: the next group of this
        # rank would have another name than on the others, and wait for ever.
        return _failure(error)._replace(retire=True)


def _call(job: Job) -> Answer:
    try:
        function, arguments = pickle.loads(job.call)
        answer = Answer(_dumps(function(*arguments)))
        dist.barrier()  # a rank that leaves early closes sockets on which others still wait
        return answer
    except BaseException as error:  # the SystemExit of a command line under test is an answer too
        return _failure(error)


def _failure(error: BaseException) -> Answer:
    moment, text = time.monotonic(), traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return Answer(b"", None, text, moment)
    return Answer(b"", error, text, moment)


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


@contextlib.contextmanager
def _group(job: Job) -> Iterator[None]:
    """A default process group and torchrun's environment variables during one call."""
    variables = {
        "RANK": job.rank,
        "WORLD_SIZE": job.world_size,
        "LOCAL_RANK": job.rank,
        "LOCAL_WORLD_SIZE": job.world_size,
    }
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.manual_seed(0)
    store = dist.FileStore(job.store, job.world_size)
    timeout = datetime.timedelta(seconds=job.timeout + 60)  # longer than the pool's timeout, which shows the stacks
    dist.init_process_group("gloo", store=store, rank=job.rank, world_size=job.world_size, timeout=timeout)
    try:
        dist.barrier()  # a function that fails at once closes sockets to which others still connect
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        _forget_meshes()
        os.environ.clear()
        os.environ.update(before)


def _forget_meshes() -> None:
    """Empty torch's caches of DTensor operations, and free the groups that they kept.

    Each group has threads, and hundreds of idle ones of earlier calls make a machine very slow. And a mesh of the next
    call compares equal to one of this call, so that a cached result would contain the old mesh, whose process groups no
    longer exist. torch has no public function for this.
    """
    from torch.distributed.tensor import _collective_utils, _redistribute, debug

    debug._clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()
    _collective_utils.MeshTopoInfo.build_from_mesh.cache_clear()
    if hasattr(_redistribute, "clear_redistribute_planner_cache"):  # newer than torch 2.11
        _redistribute.clear_redistribute_planner_cache()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
