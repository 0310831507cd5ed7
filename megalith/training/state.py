"""Everything that changes during a run besides tensors; it is what train_state.json holds."""

from __future__ import annotations

import dataclasses

FAILED = "an error"  # reason of a stop after which nothing may be saved: the step was not whole


@dataclasses.dataclass
class Progress:
    """Where a run stands. Samples are counted over all processes."""

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    scheduled_samples: int = 0  # samples of steps that changed the weights: what the schedule goes by
    skipped_iterations: int = 0
    nan_iterations: int = 0
    stop: str | None = None  # why the run is to end before its time; set by callbacks and signals

    def numbers(self) -> dict:
        """The part that a checkpoint keeps."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "stop"}

    @classmethod
    def resumed(cls, stored: dict) -> Progress:
        """The state of a checkpoint, as `numbers` gave it."""
        return cls(**{field.name: stored[field.name] for field in dataclasses.fields(cls) if field.name in stored})
