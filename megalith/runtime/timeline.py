"""The timeline of a pipeline's step: measured on all its processes, beside what the schedule would do at best."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megalith.checkpoint.ranks import Ranks
from megalith.parallel.pipeline.schedules import Span, Work, bubble, order, play
from megalith.runtime.build import Runtime

UNIT = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}  # a backward pass costs twice a forward pass


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One step. Bubbles are idle over computing time, all processes together."""

    schedule: str
    micro_batches: int
    measured: list[Span]  # seconds since the step began
    ideal: list[Span]  # the same work in the time each kind of it took on average, and transfers in none

    @property
    def processes(self) -> int:
        """Processes of the pipeline."""
        return 1 + max(span.process for span in self.measured)

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return 1 + max(span.work.stage for span in self.measured)

    def bubbles(self) -> tuple[float, float, float]:
        """Measured; of `ideal`; and the schedule's own, with stages of one cost."""
        works = order(self.schedule, self.processes, self.micro_batches, self.stages // self.processes)
        return bubble(self.measured), bubble(self.ideal), bubble(play(works, lambda work: UNIT[work.kind]))


def record(runtime: Runtime) -> None:
    """Time the steps from now on. Waiting for the device before and after each piece of work slows accelerators a little."""
    assert runtime.pipeline is not None, "there is no pipeline to time"
    runtime.pipeline.spans = []


def collect(runtime: Runtime) -> Timeline:
    """The last step's timeline, timing ended. Every process of the pipeline must call."""
    pipeline = runtime.pipeline
    assert pipeline is not None and pipeline.spans is not None, "nothing was timed"
    mine, pipeline.spans = pipeline.spans, None
    parts: list[list[Span]] = Ranks(runtime.mesh.devices["pp"].get_group()).collect(lambda: mine)
    measured = [span for part in parts for span in part]
    micro_batches = 1 + max(span.work.micro_batch for span in measured)
    works = [[span.work for span in part] for part in parts]
    cost = mean_seconds(measured)
    return Timeline(pipeline.schedule, micro_batches, measured, play(works, lambda work: cost[work.kind, work.stage]))


def mean_seconds(spans: Sequence[Span]) -> dict[tuple[str, int], float]:
    """Mean duration by (kind, stage)."""
    taken: dict[tuple[str, int], list[float]] = {}
    for span in spans:
        taken.setdefault((span.work.kind, span.work.stage), []).append(span.end - span.start)
    return {key: sum(values) / len(values) for key, values in taken.items()}


__all__ = ["Span", "Timeline", "Work", "collect", "mean_seconds", "record"]
