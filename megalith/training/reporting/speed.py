"""How fast a run goes, over the steps that were last added."""

from __future__ import annotations

import collections

from megalith.common import units
from megalith.training.callbacks import RunInfo, StepRecord
from megalith.training.reporting.peaks import mfu


class Speed:
    """A window over the latest steps; the first of a process (which compiles, allocates) is dropped at the second."""

    def __init__(self, run: RunInfo, window: int = 20):
        self.run = run
        self.steps: collections.deque[StepRecord] = collections.deque(maxlen=window)

    def add(self, record: StepRecord) -> None:
        """Take one more step into the window."""
        if len(self.steps) == 1 and self.steps[0].step == self.run.start_step + 1:
            self.steps.clear()
        self.steps.append(record)

    @property
    def seconds_per_step(self) -> float:
        """Mean over the window."""
        return sum(record.seconds for record in self.steps) / max(len(self.steps), 1)

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return sum(record.tokens for record in self.steps) / max(sum(record.seconds for record in self.steps), 1e-9)

    def tflops(self) -> tuple[float, float]:
        """Model TFLOP/s per device: attention in full, and at its causal half."""
        tera_tokens = self.tokens_per_second / self.run.world_size / 1e12
        return tera_tokens * self.run.flops_per_token_full, tera_tokens * self.run.flops_per_token_half

    def mfu(self) -> tuple[float, float] | None:
        """The same as a fraction of the device's peak, 0 to 1; None where the peak is unknown."""
        run, speed = self.run, self.tokens_per_second
        full = mfu(speed, run.flops_per_token_full, run.peak_flops, run.world_size)
        half = mfu(speed, run.flops_per_token_half, run.peak_flops, run.world_size)
        return None if full is None or half is None else (full, half)

    def time_left(self) -> str:
        """Until the last step, as people read it."""
        done = self.steps[-1].step if self.steps else self.run.start_step
        return units.duration(max(self.run.train_iters - done, 0) * self.seconds_per_step)
