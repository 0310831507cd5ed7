"""Pipeline schedules by name, and the order of each process's work in them (planner/timeline.py: how long it takes)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from megalith.planner.timeline import Work


@dataclasses.dataclass
class ModelFreeStage:
    """In place of a PipelineStage: what torch's schedules read of it when they are constructed, to read their order."""

    group_rank: int
    group_size: int
    num_stages: int
    submod: None = None
    stage_index_to_group_rank: dict[int, int] = dataclasses.field(default_factory=dict)  # set by torch


class DualPipeV(ScheduleDualPipeV):
    """torch's DualPipeV, except that a paired forward and backward pass are two actions.

    torch (2.13) sends the results of both when both are done, although they run one after the other. Here the result of
    the first is sent at once; other processes waited for it for 3 % of a step (benchmarks/pipeline.py).
    """

    def _prepare_schedule_with_comms(self, actions, *args, **kwargs) -> None:
        unpaired = {rank: _unpair(listed) for rank, listed in actions.items()}
        super()._prepare_schedule_with_comms(unpaired, *args, **kwargs)


SCHEDULES: dict[str, type] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": DualPipeV,
}


def has_one_stage_per_process(name: str) -> bool:
    """Whether the schedule runs one stage per process."""
    return issubclass(SCHEDULES[name], PipelineScheduleSingle)


def order(name: str, processes: int, micro_batches: int, stages_per_process: int = 1) -> list[list[Work]]:
    """The work of each process of the pipeline, in order.

    stages_per_process: for schedules with several; one-stage schedules take no notice of it.
    """
    if has_one_stage_per_process(name):  # torch's own order is off by one on the last process of 1F1B (2.13)
        ahead = [
            micro_batches if name == "gpipe" else min(micro_batches, processes - process)
            for process in range(processes)
        ]
        return [_one_stage(process, micro_batches, count) for process, count in enumerate(ahead)]
    schedule = schedule_without_model(name, processes, micro_batches, stages_per_process)
    return [
        [
            Work(action.computation_type.value, action.stage_index, action.microbatch_index)
            for action in _unpair(listed)
            if action
        ]
        for _, listed in sorted(schedule.pipeline_order.items())
    ]


def schedule_without_model(name: str, processes: int, micro_batches: int, stages_per_process: int) -> Any:
    """torch's schedule of several stages per process, to read its order (of all processes); it cannot run."""
    stage = ModelFreeStage(group_rank=0, group_size=processes, num_stages=processes * stages_per_process)
    return SCHEDULES[name]([stage] * stages_per_process, micro_batches)


def _one_stage(stage: int, micro_batches: int, ahead: int) -> list[Work]:
    """GPipe or 1F1B: `ahead` forward passes first, then a backward and a forward pass in turn."""
    works = [Work("F", stage, number) for number in range(ahead)]
    for number in range(micro_batches):
        works.append(Work("B", stage, number))
        works += [Work("F", stage, number + ahead)] if number + ahead < micro_batches else []
    return works


def _unpair(actions: Sequence[Any]) -> list[Any]:
    """torch's actions (None: idle), with each overlapped pair of a forward and a backward pass as two."""
    return [
        piece for action in actions for piece in (action.sub_actions if action and action.sub_actions else (action,))
    ]
