"""Several ranks doing one job: what fails on one fails on all, with the same words, and nobody is left waiting.

The one place where objects travel between ranks, so that a simulated world (torch's `fake` backend: one process as one
rank of many, whose collectives do nothing) can stand in: there all ranks do what this one does.
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
    """What went wrong on some rank, in words: an exception itself may not survive the journey."""

    text: str


class Ranks:
    """The ranks of a process group, or this one process where there is none. Objects travel over gloo, on the CPU."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, own: bool = False):
        """group: None is the default group. own: make a new group, for a thread beside the training's collectives.

        Where the group has no CPU backend (NCCL) one is made beside it, once. Both are collective calls.
        """
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size, self.simulated = 0, 1, False
        if dist.is_available() and dist.is_initialized():
            members: Any = group or dist.group.WORLD
            self.simulated = dist.get_backend(members) == "fake"
            self.group = members if self.simulated else _gloo(members) if own else _cpu(members)
            self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def collect(self, work: Callable[[], Any], conclude: Callable[[list], Any] = list) -> Any:
        """Run `work` on every rank and `conclude` on rank 0 with the list of results; everyone gets what that returns.

        Raises CheckpointError on every rank where anything failed anywhere.
        """
        return self._exchange(work, conclude, scatter=False)

    def distribute(self, work: Callable[[], Any], conclude: Callable[[list], list]) -> Any:
        """As `collect`, but `conclude` returns a list, of which each rank gets its own entry."""
        return self._exchange(work, conclude, scatter=True)

    def every(self, work: Callable[[], Any]) -> Any:
        """Run `work` on every rank; return this rank's result, or raise everywhere where it failed anywhere."""
        kept = []
        self.collect(lambda: kept.append(work()), lambda results: None)
        return kept[0]

    def first(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 alone; everyone gets its result or its failure."""
        return self.collect(lambda: None, lambda results: work())

    def _exchange(self, work: Callable[[], Any], conclude: Callable[[list], Any], *, scatter: bool) -> Any:
        mine, error = _attempt(
            lambda: self._packed(work())
        )  # here, so that what cannot be sent fails like anything else
        answer: Any = None
        results = self._gather(mine)
        if self.rank == 0 or self.simulated:
            failures = {number: result.text for number, result in enumerate(results) if isinstance(result, _Failure)}
            if failures:
                answer = _Failure(_tell(failures, self.size))
            else:
                answer, error = _attempt(lambda: self._concluded(conclude, results, scatter))
        answer = self._spread(answer, scatter)
        if isinstance(answer, _Failure):
            raise CheckpointError(answer.text) from error
        return self._unpacked(answer)

    def _concluded(self, conclude: Callable[[list], Any], results: list, scatter: bool) -> Any:
        answer = conclude([self._unpacked(result) for result in results])
        if not scatter:
            return self._packed(answer)
        if len(answer) != self.size:
            raise ValueError(f"{len(answer)} entries for {self.size} ranks")
        return [self._packed(entry) for entry in answer]

    def _packed(self, value: Any) -> Any:
        """As bytes, where it is to travel."""
        return value if self.size == 1 or self.simulated else pickle.dumps(value)

    def _unpacked(self, value: Any) -> Any:
        return value if self.size == 1 or self.simulated else pickle.loads(value)

    def _gather(self, value: Any) -> list:
        if self.size == 1 or self.simulated:
            return [value] * self.size
        results: list | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, results, dst=dist.get_global_rank(self.group, 0), group=self.group)  # type: ignore[arg-type]
        return results or []

    def _spread(self, answer: Any, scatter: bool) -> Any:
        """Rank 0's answer to all, or entry by entry; a failure goes to all either way."""
        if self.size == 1 or self.simulated:
            return answer[self.rank] if scatter and not isinstance(answer, _Failure) else answer
        source = dist.get_global_rank(self.group, 0)  # type: ignore[arg-type]
        if scatter:
            entries = [answer] * self.size if isinstance(answer, _Failure) else answer
            received: list = [None]
            dist.scatter_object_list(received, entries, src=source, group=self.group)
            return received[0]
        box = [answer]
        dist.broadcast_object_list(box, src=source, group=self.group)
        return box[0]


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except CheckpointError as error:
        return _Failure(str(error)), error
    except Exception as error:
        return _Failure(f"{type(error).__name__}: {error}"), error


def _tell(failures: dict[int, str], size: int) -> str:
    """One message of several ranks' failures; what all said alike is said once."""
    texts = set(failures.values())
    if len(texts) == 1 and len(failures) == size:
        return texts.pop()
    return "; ".join(f"rank {number}: {text}" for number, text in failures.items())


def _cpu(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """`group` itself where it can move CPU objects, else a gloo group of the same ranks, made at the first call."""
    if "gloo" in dist.get_backend_config(group):
        return group
    if group not in _CPU_GROUPS:
        _CPU_GROUPS[group] = _gloo(group)
    return _CPU_GROUPS[group]


def _gloo(group: dist.ProcessGroup) -> dist.ProcessGroup:
    members = dist.get_process_group_ranks(group)
    return dist.new_group(members, backend="gloo", use_local_synchronization=len(members) < dist.get_world_size())
