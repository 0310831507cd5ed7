"""The timeline of a pipeline's step: measured on all its processes, and ideal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megalith.checkpoint.ranks import Ranks
from megalith.parallel.pipeline.schedules import order
from megalith.planner.timeline import Span, Work, simulate, timeline_bubble
from megalith.runtime.build import Runtime

UNIT = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}  # a backward pass costs twice a forward pass


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One step. Bubbles are idle over computing time, all processes together."""

    schedule: str
    micro_batches: int
    measured: list[Span]  # seconds since the step began
    ideal: list[Span]  # simulated: each kind of work takes its mean measured time, transfers take none

    @property
    def processes(self) -> int:
        """Processes of the pipeline."""
        return 1 + max(span.process for span in self.measured)

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return 1 + max(span.work.stage for span in self.measured)

    def bubbles(self) -> tuple[float, float, float]:
        """Of `measured`; of `ideal`; and of the schedule with stages of equal cost."""
        works = order(self.schedule, self.processes, self.micro_batches, self.stages // self.processes)
        equal = simulate(works, lambda work: UNIT[work.kind])
        return timeline_bubble(self.measured), timeline_bubble(self.ideal), timeline_bubble(equal)


def record(runtime: Runtime) -> None:
    """Time the steps from now on.

    Accelerators become a little slower, as each piece of work waits for the device before and after.
    """
    assert runtime.pipeline is not None, "there is no pipeline to time"
    runtime.pipeline.spans = []


def collect(runtime: Runtime) -> Timeline:
    """Stop timing and return the last step's timeline. Every process of the pipeline must call."""
    pipeline = runtime.pipeline
    assert pipeline is not None and pipeline.spans is not None, "nothing was timed"
    local, pipeline.spans = pipeline.spans, None
    by_rank: list[list[Span]] = Ranks(runtime.mesh.device_mesh["pp"].get_group()).collect(lambda: local)
    measured = [span for spans in by_rank for span in spans]
    micro_batches = 1 + max(span.work.micro_batch for span in measured)
    works = [[span.work for span in spans] for spans in by_rank]
    cost = mean_seconds(measured)
    ideal = simulate(works, lambda work: cost[work.kind, work.stage])
    return Timeline(pipeline.schedule, micro_batches, measured, ideal)


def mean_seconds(spans: Sequence[Span]) -> dict[tuple[str, int], float]:
    """Mean duration by (kind, stage)."""
    durations: dict[tuple[str, int], list[float]] = {}
    for span in spans:
        durations.setdefault((span.work.kind, span.work.stage), []).append(span.end - span.start)
    return {key: sum(values) / len(values) for key, values in durations.items()}


__all__ = ["Span", "Timeline", "Work", "collect", "mean_seconds", "record"]
