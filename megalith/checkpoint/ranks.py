"""Several ranks doing one job: what fails on one fails on all, with the same message, and no rank is left waiting.

All objects that are sent between ranks are sent here, so that a simulated world (torch's `fake` backend: one process as
one rank of many, whose collectives do nothing) works too: there all ranks are assumed to do what this one does.
"""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from megalith.common.errors import CheckpointError

_CPU_GROUPS: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


class _Failure(NamedTuple):
    """What went wrong on some rank, as text: an exception itself may not survive pickling."""

    text: str


class Ranks:
    """The ranks of a process group, or this one process where there is none. Objects are sent over gloo, on the CPU."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, new_group: bool = False):
        """group: None is the default group. new_group: make a group, for a thread beside the training's collectives.

        Where the group has no CPU backend (NCCL) a gloo group of its ranks is made, once. Both are collective calls.
        """
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size, self.simulated = 0, 1, False
        if dist.is_available() and dist.is_initialized():
            members: Any = group or dist.group.WORLD
            self.simulated = dist.get_backend(members) == "fake"
            self.group = members if self.simulated else _new_gloo_group(members) if new_group else _cpu_group(members)
            self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def collect(self, work: Callable[[], Any], combine: Callable[[list], Any] = list) -> Any:
        """Run `work` on every rank and `combine` on rank 0 with the list of results; every rank gets what that returns.

        Raises CheckpointError on every rank where anything failed on any.
        """
        return self._exchange(work, combine, scatter=False)

    def distribute(self, work: Callable[[], Any], combine: Callable[[list], list]) -> Any:
        """As `collect`, but `combine` returns a list, of which each rank gets its entry."""
        return self._exchange(work, combine, scatter=True)

    def on_every_rank(self, work: Callable[[], Any]) -> Any:
        """Run `work` on every rank; return this rank's result, or raise on every rank where it failed on any."""
        local_results = []
        self.collect(lambda: local_results.append(work()), lambda results: None)
        return local_results[0]

    def on_rank_0(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 alone; every rank gets its result or its failure."""
        return self.collect(lambda: None, lambda results: work())

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank; what other ranks give is not looked at."""
        return self._broadcast(value, scatter=False)

    def _exchange(self, work: Callable[[], Any], combine: Callable[[list], Any], *, scatter: bool) -> Any:
        # Serialized here, so that what cannot be sent fails like anything else.
        local_result, error = _attempt(lambda: self._serialize(work()))
        answer: Any = None
        results = self._gather(local_result)
        if self.rank == 0 or self.simulated:
            failures = {number: result.text for number, result in enumerate(results) if isinstance(result, _Failure)}
            if failures:
                answer = _Failure(_describe_failures(failures, self.size))
            else:
                answer, error = _attempt(lambda: self._combine(combine, results, scatter))
        answer = self._broadcast(answer, scatter)
        if isinstance(answer, _Failure):
            raise CheckpointError(answer.text) from error
        return self._deserialize(answer)

    def _combine(self, combine: Callable[[list], Any], results: list, scatter: bool) -> Any:
        answer = combine([self._deserialize(result) for result in results])
        if not scatter:
            return self._serialize(answer)
        if len(answer) != self.size:
            raise ValueError(f"{len(answer)} entries for {self.size} ranks")
        return [self._serialize(entry) for entry in answer]

    def _serialize(self, value: Any) -> Any:
        """As bytes, where it is to be sent."""
        return value if self.size == 1 or self.simulated else pickle.dumps(value)

    def _deserialize(self, value: Any) -> Any:
        return value if self.size == 1 or self.simulated else pickle.loads(value)

    def _gather(self, value: Any) -> list:
        if self.size == 1 or self.simulated:
            return [value] * self.size
        results: list | None = [None] * self.size if self.rank == 0 else None
        destination = dist.get_global_rank(self.group, 0)  # type: ignore[arg-type]
        dist.gather_object(value, results, dst=destination, group=self.group)
        return results or []

    def _broadcast(self, answer: Any, scatter: bool) -> Any:
        """Rank 0's answer to all, or entry by entry; a failure goes to all either way."""
        if self.size == 1 or self.simulated:
            return answer[self.rank] if scatter and not isinstance(answer, _Failure) else answer
        source = dist.get_global_rank(self.group, 0)  # type: ignore[arg-type]
        if scatter:
            entries = [answer] * self.size if isinstance(answer, _Failure) else answer
            received: list = [None]
            dist.scatter_object_list(received, entries, src=source, group=self.group)
            return received[0]
        objects = [answer]
        dist.broadcast_object_list(objects, src=source, group=self.group)
        return objects[0]


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except CheckpointError as error:
        return _Failure(str(error)), error
    except Exception as error:
        return _Failure(f"{type(error).__name__}: {error}"), error


def _describe_failures(failures: dict[int, str], size: int) -> str:
    """One message of several ranks' failures; a text that all of them have is shown once."""
    texts = set(failures.values())
    if len(texts) == 1 and len(failures) == size:
        return texts.pop()
    return "; ".join(f"rank {number}: {text}" for number, text in failures.items())


def _cpu_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """`group` itself where it can send CPU tensors, else a gloo group of the same ranks, made at the first call."""
    if "gloo" in dist.get_backend_config(group):
        return group
    if group not in _CPU_GROUPS:
        _CPU_GROUPS[group] = _new_gloo_group(group)
    return _CPU_GROUPS[group]


def _new_gloo_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    members = dist.get_process_group_ranks(group)
    return dist.new_group(members, backend="gloo", use_local_synchronization=len(members) < dist.get_world_size())
