"""How long a step of a pipeline takes: the order of work and the seconds of each piece give a timeline. No torch.

`simulate` gives the ideal that a measured timeline is drawn beside, and answers "what would 8 processes do with stages
as fast as these". The orders of the schedules are those of parallel/pipeline/schedules.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Work(NamedTuple):
    """A piece of work: forward (F), whole backward (B), or its halves for activations (I) and weights (W).

    In torch.distributed.pipelining an action, with the same letters. stage: number in the whole pipeline.
    """

    kind: str
    stage: int
    micro_batch: int


class Span(NamedTuple):
    """When a process (a pipeline rank) did a piece of work, in seconds since the step began."""

    process: int
    work: Work
    start: float
    end: float


def simulate(order: Sequence[Sequence[Work]], seconds: Callable[[Work], float], transfer: float = 0.0) -> list[Span]:
    """When each piece of work is done if every process starts it as soon as it is free and its input is there.

    Each process does its work in the given order. Its spans come in that order, those of processes mixed.
    order: the work of each process, in order.
    seconds: how long a piece of work takes.
    transfer: seconds that an activation or gradient takes between two processes.
    """
    last = max(work.stage for works in order for work in works)
    process_of = {work.stage: process for process, works in enumerate(order) for work in works}
    done: dict[Work, float] = {}
    free, position, spans = [0.0] * len(order), [0] * len(order), list[Span]()
    while any(position[process] < len(works) for process, works in enumerate(order)):
        before = len(spans)
        for process, works in enumerate(order):
            while position[process] < len(works):
                work = works[position[process]]
                inputs = _inputs(work, last)
                ready = [_ready(choices, done, process_of, process, transfer) for choices in inputs]
                if None in ready:
                    break
                start = max([free[process], *(moment for moment in ready if moment is not None)])
                free[process] = done[work] = start + seconds(work)
                spans.append(Span(process, work, start, free[process]))
                position[process] += 1
        assert len(spans) > before, "the order of a schedule waits for itself"
    return spans


def _inputs(work: Work, last: int) -> list[list[Work]]:
    """What must be done before `work`: one piece of each inner list (a backward pass is whole or in halves)."""
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
    """When the result of the one of `choices` that is done reaches `process`; None where none is done."""
    for work in choices:
        if work in done:
            return done[work] + (transfer if process_of[work.stage] != process else 0.0)
    return None


def timeline_bubble(spans: Sequence[Span]) -> float:
    """Idle time over computing time of a step, all processes together, from the first start to the last end."""
    processes = {span.process for span in spans}
    busy = sum(span.end - span.start for span in spans)
    length = max(span.end for span in spans) - min(span.start for span in spans)
    return (length * len(processes) - busy) / busy


def ideal_bubble(schedule: str, processes: int, micro_batches: int, stages_per_process: int = 1) -> float:
    """Idle time over computing time of a step by formula, for stages of one cost whose transfers cost nothing.

    GPipe and 1F1B: (p - 1) / m. Interleaved (Narayanan et al., 2021, section 2.2): (p - 1) / (v m). Zero-bubble ZB-H1
    (Qi et al., 2024, section 2.3) with forward, input and weight parts of one cost: (p - 1) / (3 v m). V-shaped
    schedules have no formula of this kind; `simulate` gives theirs.
    """
    v = stages_per_process
    divisors = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": v, "zero_bubble": 3 * v}
    return (processes - 1) / (divisors[schedule] * micro_batches)
