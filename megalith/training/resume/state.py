"""Everything that changes during a run besides tensors; it is what train_state.json holds."""

from __future__ import annotations

import dataclasses
import math
import os

SIGNAL, TIME_LIMIT = "asked by a signal", "--exit-duration-in-mins is over"
STOP_REASONS = (SIGNAL, TIME_LIMIT)  # why a process may ask that the run end; every process has the same list
FAILED = "an error"  # reason of a stop after which nothing may be saved: the step was interrupted


@dataclasses.dataclass(frozen=True)
class Best:
    """The best validation of a run: its step, and the value of a metric (or the loss) there."""

    step: int
    metric: str
    value: float
    highest: bool  # whether the highest value is the best, not the lowest

    def better_than(self, other: Best | None) -> bool:
        """Whether it is better; of equals the first is kept. What is not a number is never better."""
        if math.isnan(self.value):
            return False
        if other is None:
            return True
        return self.value > other.value if self.highest else self.value < other.value


@dataclasses.dataclass
class Progress:
    """How far a run has come. Samples are counted over all processes."""

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    counted_validation: int | None = None  # step of the last validation in consumed_valid_samples; None: not known
    scheduled_samples: int = 0  # samples of steps that changed the weights: the schedule is a function of them
    skipped_iterations: int = 0
    nan_iterations: int = 0
    # A name for the run, in its checkpoints; rank 0's is saved.
    run: str = dataclasses.field(default_factory=lambda: os.urandom(8).hex())
    stop: str | None = None  # why the run is to end before its time; set by callbacks and signals
    saved: int | None = None  # the last step that this process took part in saving
    best: Best | None = None  # its checkpoint is not deleted; metrics.jsonl tells the next start of it

    def numbers(self) -> dict:
        """The fields that a checkpoint keeps."""
        return {
            name: value for name, value in dataclasses.asdict(self).items() if name not in ("stop", "saved", "best")
        }

    @classmethod
    def resumed(cls, stored: dict, same_run: bool = True) -> Progress:
        """The state of a checkpoint, as `numbers` returned it. same_run: whether the same run is resumed."""
        names = {field.name for field in dataclasses.fields(cls)} - (set() if same_run else {"run"})
        return cls(**{name: stored[name] for name in names if name in stored})
