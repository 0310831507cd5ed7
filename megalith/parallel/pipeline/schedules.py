"""Pipeline schedules by name, the order in which each process works them off, and how long that takes.

`play` turns an order and the seconds of each piece of work into a timeline, without running anything: the ideal that a measured
one is drawn beside, and the answer to "what would 8 processes do with stages as fast as these".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleSingle


class DualPipeV(ScheduleDualPipeV):
    """torch's (2.13) hands on what a paired forward and backward pass made when both are done. They run one after the other all the same,
    so here the first is handed on at once: the others waited for it 3 % of a step (benchmarks/pipeline.py).
    """

    def _prepare_schedule_with_comms(self, actions, *args, **kwargs) -> None:
        super()._prepare_schedule_with_comms(
            {rank: _apart(listed) for rank, listed in actions.items()}, *args, **kwargs
        )


SCHEDULES: dict[str, type] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": DualPipeV,
}


class Work(NamedTuple):
    """A piece of work: forward (F), whole backward (B), or its halves for activations (I) and weights (W)."""

    kind: str
    stage: int
    micro_batch: int


class Span(NamedTuple):
    """When a process did a piece of work, in seconds since the step began."""

    process: int
    work: Work
    start: float
    end: float


def single(name: str) -> bool:
    """Whether the schedule runs one stage per process."""
    return issubclass(SCHEDULES[name], PipelineScheduleSingle)


def order(name: str, processes: int, micro_batches: int, stages_per_process: int = 1) -> list[list[Work]]:
    """What each process does, in order."""
    if single(name):  # not torch's own listing, which is off by one on the last process of 1F1B (2.13)
        ahead = [
            micro_batches if name == "gpipe" else min(micro_batches, processes - process)
            for process in range(processes)
        ]
        return [_one_stage(process, micro_batches, count) for process, count in enumerate(ahead)]
    schedule = without_model(name, processes, micro_batches, stages_per_process)
    return [
        [
            Work(action.computation_type.value, action.stage_index, action.microbatch_index)
            for action in _apart(listed)
            if action
        ]
        for _, listed in sorted(schedule.pipeline_order.items())
    ]


def without_model(name: str, processes: int, micro_batches: int, stages_per_process: int) -> Any:
    """torch's schedule of several stages a process, as the first process has it, with nothing to run."""
    stage = mock.create_autospec(PipelineStage, instance=True)  # the schedule only asks for its place
    stage.group_rank, stage.group_size, stage.num_stages, stage.submod = (
        0,
        processes,
        processes * stages_per_process,
        None,
    )
    return SCHEDULES[name]([stage] * stages_per_process, micro_batches)


def _one_stage(stage: int, micro_batches: int, ahead: int) -> list[Work]:
    """Forward passes up to `ahead` of the backward passes, then one of each in turn, backward first."""
    works = [Work("F", stage, number) for number in range(ahead)]
    for number in range(micro_batches):
        works.append(Work("B", stage, number))
        works += [Work("F", stage, number + ahead)] if number + ahead < micro_batches else []
    return works


def _apart(actions: Sequence[Any]) -> list[Any]:
    """torch's actions (None: idle), of which an overlapped forward and backward pass becomes two."""
    return [
        piece for action in actions for piece in (action.sub_actions if action and action.sub_actions else (action,))
    ]


def play(order: Sequence[Sequence[Work]], seconds: Callable[[Work], float], transfer: float = 0.0) -> list[Span]:
    """When each piece of work is done if every process starts it as soon as it is free and its input is there.

    transfer: seconds that an activation or gradient takes from one process to another.
    """
    last = max(work.stage for works in order for work in works)
    process_of = {work.stage: process for process, works in enumerate(order) for work in works}
    done: dict[Work, float] = {}
    free, at, spans = [0.0] * len(order), [0] * len(order), list[Span]()
    while any(at[process] < len(works) for process, works in enumerate(order)):
        before = len(spans)
        for process, works in enumerate(order):
            while at[process] < len(works):
                work = works[at[process]]
                needed = _needed(work, last)
                ready = [_ready(choices, done, process_of, process, transfer) for choices in needed]
                if None in ready:
                    break
                start = max([free[process], *(moment for moment in ready if moment is not None)])
                free[process] = done[work] = start + seconds(work)
                spans.append(Span(process, work, start, free[process]))
                at[process] += 1
        assert len(spans) > before, "the order of a schedule waits for itself"
    return spans


def _needed(work: Work, last: int) -> list[list[Work]]:
    """What must be done before: of each list, one (a backward pass is whole or in halves)."""
    stage, micro_batch = work.stage, work.micro_batch
    if work.kind == "F":
        return [] if stage == 0 else [[Work("F", stage - 1, micro_batch)]]
    if work.kind == "W":
        return [[Work("I", stage, micro_batch)]]
    after = [] if stage == last else [[Work("B", stage + 1, micro_batch), Work("I", stage + 1, micro_batch)]]
    return [[Work("F", stage, micro_batch)], *after]


def _ready(
    choices: list[Work], done: dict[Work, float], process_of: dict[int, int], process: int, transfer: float
) -> float | None:
    for work in choices:
        if work in done:
            return done[work] + (transfer if process_of[work.stage] != process else 0.0)
    return None


def bubble(spans: Sequence[Span]) -> float:
    """Idle time over computing time of a step, all processes together: from the first start anywhere to the last end anywhere."""
    processes = {span.process for span in spans}
    busy = sum(span.end - span.start for span in spans)
    whole = max(span.end for span in spans) - min(span.start for span in spans)
    return (whole * len(processes) - busy) / busy
