"""What a run tells to whoever listens: the loop knows nothing of logging, drawing or displays, callbacks do."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import pathlib
import sys

from megalith.config.run import RunConfig


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

    @property
    def writes(self) -> bool:
        """Whether this rank writes files and lines: the last one, which holds the loss under pipelining too."""
        return self.rank == self.world_size - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step, in Python numbers: reading them costs a callback no wait for the device."""

    step: int  # counted from 1
    consumed_samples: int  # after the step
    loss: dict[str, float]  # mean per name, over the global batch; "lm loss" is Megatron's name of a language model's
    learning_rate: float
    weight_decay: float
    global_batch_size: int
    tokens: int  # of the global batch
    seconds: float  # wall time since the last step's end, validation and saving left out
    grad_norm: float | None = None  # before clipping
    loss_scale: float = 1.0
    skipped: bool = False  # loss or gradients were infinite or not a number, the weights did not change
    nan: bool = False  # the loss was infinite or not a number
    lasting: bool = False  # skipped, and no smaller loss scale can help
    uncounted: tuple[str, ...] = ()  # names of losses that no token of the batch counts for (all masked); their value is nan
    params_norm: float | None = None
    zeros: float | None = None  # gradient elements that are exactly zero

    @property
    def total_loss(self) -> float:
        """The sum of all entries whose name ends in "loss" (others are accuracies and the like)."""
        return total_loss(self.loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """One pass over validation or test data."""

    step: int
    consumed_samples: int
    loss: dict[str, float]
    split: str = "validation"  # or "test"
    at_end: bool = False  # after the last step, not between two
    seconds: float = 0.0

    @property
    def total_loss(self) -> float:
        """As StepRecord.total_loss."""
        return total_loss(self.loss)


class Callback:
    """Base of all callbacks; override what you need. Every rank calls every method, so ask `run.writes` before writing.

    A callback sees numbers that the step has anyway. One that waits for the device or talks to other ranks slows every step.
    """

    def on_start(self, run: RunInfo) -> None:
        """Before the first step of this process."""

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """After every step."""

    def on_validation(self, run: RunInfo, record: ValidationRecord) -> None:
        """After every pass over validation or test data."""

    def on_end(self, run: RunInfo) -> None:
        """When the run ends or is interrupted; called also where a step raised, so that a display gives the terminal back."""


def print_lines(*lines: str) -> None:
    """Print lines on standard output. Where nobody reads it any more (`| head`, a terminal that was closed) the run goes on in silence."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with contextlib.suppress(OSError):
            print(f"megalith: nobody reads standard output any more ({error.strerror}); the run goes on", file=sys.stderr, flush=True)


def total_loss(losses: dict[str, float]) -> float:
    """The sum of all entries whose name ends in "loss"."""
    return sum(value for name, value in losses.items() if name.endswith("loss"))


def perplexity(loss: float) -> float:
    """exp(loss), of a loss above 20 that of 20 as Megatron prints it; infinite or not a number where the loss is."""
    return math.exp(min(20.0, loss)) if math.isfinite(loss) else loss
