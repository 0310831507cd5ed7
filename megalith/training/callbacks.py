"""Callbacks, and what they are given: the loop knows nothing of logging, drawing or displays, callbacks do that."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import pathlib
import sys

from megalith.config.run import RunConfig
from megalith.training.step import StepResult, Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The run, as callbacks see it."""

    config: RunConfig
    folder: pathlib.Path  # the run folder
    train_iters: int  # the step at which the run ends, also where it is counted in samples
    start_step: int = 0  # steps done before this process started; above 0 after a resume
    rank: int = 0
    world_size: int = 1
    flops_per_token_full: float = 0.0  # training FLOPs of the model per token, attention counted as if unmasked
    flops_per_token_half: float = 0.0  # the same with causal attention counted at half
    peak_flops: float | None = None  # FLOP/s of one device; None where unknown
    valid_data: str | None = None  # a hash of validation data that come by name; None of others

    @property
    def writes(self) -> bool:
        """Whether this rank writes files and log lines: the last one, which holds the loss under pipelining too."""
        return self.rank == self.world_size - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord(StepResult):
    """A step, and its position in the run. Reading it costs a callback no wait for the device."""

    step: int  # counted from 1
    consumed_samples: int  # after the step
    global_batch_size: int
    seconds: float  # wall time since the last step's end, validation and saving left out
    params_norm: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """One pass over validation or test data."""

    step: int
    consumed_samples: int
    losses: dict[str, float]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    split: str = "validation"  # or "test"
    at_end: bool = False  # after the last step, not between two
    seconds: float = 0.0

    @property
    def total_loss(self) -> float:
        """As StepResult.total_loss."""
        return sum(self.losses.values())


class Callback:
    """Base of all callbacks; override what you need. Every rank calls every method: check `run.writes` before writing.

    A callback sees numbers that the step has anyway. One that waits for the device or for other ranks slows every step.
    """

    def on_start(self, run: RunInfo) -> None:
        """Before the first step of this process."""

    def on_before_optimizer_step(self, run: RunInfo, trainer: Trainer) -> None:
        """When a step's gradients (`trainer.runtime.gradients()`) are complete and clipped, before the weights change.

        Not in a step that is skipped. Changes of the gradients take effect, and must be the same on every rank.
        """

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """After every step."""

    def on_validation(self, run: RunInfo, record: ValidationRecord) -> None:
        """After every pass over validation or test data."""

    def on_error(self, run: RunInfo, error: BaseException) -> None:
        """Where a step or a callback raised on this rank, or it was interrupted; on_end follows, unless one raised."""

    def on_end(self, run: RunInfo) -> None:
        """When the run ends or is interrupted; also where a step raised, so that a display can restore the terminal."""


def print_lines(*lines: str) -> None:
    """Print lines on standard output.

    Where nothing reads it any more (`| head`, a terminal that was closed) the run continues without printing.
    """
    try:
        print(*lines, sep="\n", flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with contextlib.suppress(OSError):
            print(
                f"megalith: nothing reads standard output any more ({error.strerror}); the run continues",
                file=sys.stderr,
                flush=True,
            )


def perplexity(loss: float) -> float:
    """exp(loss); of a loss above 20 that of 20, as Megatron prints it; infinite or not a number where the loss is."""
    return math.exp(min(20.0, loss)) if math.isfinite(loss) else loss
