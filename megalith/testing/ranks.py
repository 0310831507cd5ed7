"""A pool of ranks on one CPU: start once, run many small distributed functions.

    from megalith.testing import run_ranks

    def total(value):                                # at the top level of a module, so that ranks can import it
        tensor = torch.tensor([value + dist.get_rank()])
        dist.all_reduce(tensor)
        return tensor

    def test_total():
        assert [int(t) for t in run_ranks(total, 4, 10)] == [46, 46, 46, 46]

Importing torch costs seconds, a process group costs milliseconds. So one process imports torch and is forked for each
rank (multiprocessing's forkserver). The ranks are kept, and every call makes a new gloo group over some of them. Each
rank computes on one thread. Outside pytest, guard the calling script with `if __name__ == "__main__":`, as
multiprocessing needs it.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from megalith.testing.worker import Job, serve

MAX_RANKS = 8  # ranks beyond this only queue for the cores of one machine
GRACE_SECONDS = 3.0  # for ranks to notice that another one failed, before they are stopped
PRELOAD = ["torch", "numpy", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
SLOW = ["transformers", "accelerate"]  # imported before the fork too, where the caller has imported them


def run_ranks(function: Callable, world_size: int, *args: Any, timeout: float = 120.0) -> list:
    """Run `function(*args)` on `world_size` ranks of one gloo process group; return what each rank returned, by rank.

    `function` must be importable by name, `args` and results picklable (tensors are copied to the caller's CPU memory).
    The first exception of any rank is raised here, with its rank and traceback in its notes. Ranks that do not answer
    within `timeout` seconds raise TimeoutError with their stacks; a rank that dies raises RuntimeError. The pool can be
    used after all three.
    """
    return _shared_pool().run(function, world_size, *args, timeout=timeout)


@functools.cache
def _shared_pool() -> RankPool:
    return RankPool()


class _Rank:
    """One worker process, the caller's end of its pipe, and the file its stacks go to."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, stacks: pathlib.Path):
        self.stacks = stacks
        self.connection, worker_end = context.Pipe()
        self.process = context.Process(target=serve, args=(worker_end, str(stacks)), daemon=True)
        self.process.start()
        worker_end.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def stack(self) -> str:
        """What every thread of the rank is doing now, as faulthandler writes it."""
        if self.process.pid is None or not self.process.is_alive():
            return "(dead)"
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.3)  # the handler writes from the signal itself; there is nothing to wait on
        return self.stacks.read_text() or "(no stack: the process does not take signals)"


class RankPool:
    """Ranks that are started when first needed and reused by later calls. `run_ranks` uses one pool per process."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD + [name for name in SLOW if name in sys.modules])
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="megalith_ranks_"))
        self.ranks: list[_Rank] = []
        self.calls = 0
        atexit.register(self.close)

    @property
    def pids(self) -> list[int | None]:
        """Process ids of the living ranks, by rank."""
        return [rank.process.pid for rank in self.ranks if rank.process.is_alive()]

    def close(self) -> None:
        """Stop every rank and remove the pool's temporary folder; a later call starts new ranks."""
        for rank in self.ranks:
            rank.stop()
        self.ranks.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, function: Callable, world_size: int, *args: Any, timeout: float = 120.0) -> list:
        """See `run_ranks`."""
        if not 1 <= world_size <= MAX_RANKS:
            raise ValueError(
                f"world_size must be within a pool's 1 to {MAX_RANKS} ranks; found {world_size}. "
                f"Use fewer ranks, or torchrun."
            )
        try:
            call = pickle.dumps((function, args))
        except (pickle.PicklingError, AttributeError) as error:
            raise TypeError(
                f"{function!r} cannot be sent to ranks ({error}). Define it at the top level of a module."
            ) from error
        self._start(world_size)
        self.calls += 1
        store = self.folder / f"store{self.calls}"
        for rank in range(world_size):
            job = Job(rank, world_size, str(store), timeout, sys.path, call)
            self.ranks[rank].connection.send_bytes(pickle.dumps(job))
        try:
            return self._collect(world_size, timeout)
        finally:
            store.unlink(missing_ok=True)

    def _start(self, world_size: int) -> None:
        """Start those of the ranks 0 to world_size - 1 that do not exist yet, or that died since the last call."""
        self.folder.mkdir(exist_ok=True)
        # The fork server inherits the environment as it is now: one thread, and gloo on the loopback interface (a host
        # name need not resolve).
        variables = {"OMP_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            for rank in range(world_size):
                if rank == len(self.ranks):
                    self.ranks.append(self._new(rank))
                elif not self.ranks[rank].process.is_alive():
                    self.ranks[rank].stop()
                    self.ranks[rank] = self._new(rank)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def _new(self, rank: int) -> _Rank:
        return _Rank(self.context, self.folder / f"stacks{rank}")

    def _collect(self, world_size: int, timeout: float) -> list:
        """Wait for all answers; after a first failure GRACE_SECONDS more, then stop the running ranks and raise."""
        deadline = time.monotonic() + timeout
        values: dict[int, Any] = {}
        failures: list[tuple[float, BaseException]] = []
        while len(values) < world_size and (left := deadline - time.monotonic()) > 0:
            waiting = {self.ranks[rank].connection: rank for rank in range(world_size) if rank not in values}
            for connection in multiprocessing.connection.wait(list(waiting), timeout=left):
                rank = waiting[connection]  # type: ignore[index]
                values[rank], failure = self._receive(rank, world_size)
                if failure is not None:
                    failures.append(failure)
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        stuck = [rank for rank in range(world_size) if rank not in values]
        if stuck and not failures:
            failures.append((0.0, self._timed_out(stuck, world_size, timeout)))
        for rank in stuck:
            self.ranks[rank].stop()
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]
        return [values[rank] for rank in range(world_size)]

    def _receive(self, rank: int, world_size: int) -> tuple[Any, tuple[float, BaseException] | None]:
        """The value that a rank with an answer returned, or when it failed and how (a death precedes every error)."""
        worker = self.ranks[rank]
        try:
            answer = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, ConnectionError):
            # The exit code comes by way of the fork server, late on a busy machine.
            worker.process.join(10 * GRACE_SECONDS)
            code = worker.process.exitcode
            death = RuntimeError(f"rank {rank} of {world_size} died with exit code {code} (negative: a signal)")
            return None, (0.0, death)
        if answer.retire:
            worker.stop()  # the next call starts another
        if not answer.traceback:
            return pickle.loads(answer.value), None
        error = answer.error or RuntimeError("an exception that cannot be pickled; its traceback is in the note")
        error.add_note(f"raised on rank {rank} of {world_size}:\n{answer.traceback}")
        return None, (answer.moment, error)

    def _timed_out(self, stuck: list[int], world_size: int, timeout: float) -> TimeoutError:
        stacks = "\n".join(f"--- rank {rank} ---\n{self.ranks[rank].stack()}" for rank in stuck)
        answered = [rank for rank in range(world_size) if rank not in stuck]
        return TimeoutError(
            f"ranks {stuck} of {world_size} did not answer in {timeout:g} s (answered: {answered}); "
            f"their stacks:\n{stacks}"
        )
