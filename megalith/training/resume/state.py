"""Everything that changes during a run besides tensors; it is what train_state.json holds."""

from __future__ import annotations

import dataclasses
import os

SIGNAL, OVER = "asked by a signal", "--exit-duration-in-mins is over"
REASONS = (SIGNAL, OVER)  # why a process may ask that the run end; every process has the same list
FAILED = "an error"  # reason of a stop after which nothing may be saved: the step was not whole


@dataclasses.dataclass
class Progress:
    """Where a run stands. Samples are counted over all processes."""

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    counted_validation: int | None = (
        None  # the step whose validation is the last in consumed_valid_samples; None: not told
    )
    scheduled_samples: int = 0  # samples of steps that changed the weights: what the schedule goes by
    skipped_iterations: int = 0
    nan_iterations: int = 0
    run: str = dataclasses.field(
        default_factory=lambda: os.urandom(8).hex()
    )  # names the run in its checkpoints, as process 0 has it
    stop: str | None = None  # why the run is to end before its time; set by callbacks and signals
    saved: int | None = None  # the last step that this process took part in saving

    def numbers(self) -> dict:
        """The part that a checkpoint keeps."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("stop", "saved")}

    @classmethod
    def resumed(cls, stored: dict, same_run: bool = True) -> Progress:
        """The state of a checkpoint, as `numbers` gave it. same_run: whether it is gone on with where it was left."""
        names = {field.name for field in dataclasses.fields(cls)} - (set() if same_run else {"run"})
        return cls(**{name: stored[name] for name in names if name in stored})
