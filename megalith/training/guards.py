"""Callbacks that stop a run that has diverged or learns nothing, and keep what was good before it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from megalith.common.errors import TrainingError
from megalith.config.run import RunConfig
from megalith.training.callbacks import Callback, RunInfo, StepRecord, ValidationRecord
from megalith.training.resume.state import Progress

EMPTY_STEPS = 10  # steps in a row without anything to learn that end a run


def most_nonfinite(config: RunConfig) -> int:
    """Steps in a row, not finite though no smaller loss scale can help, that end a run.

    Float16 overflows now and then on a batch that others do not resemble, so one is no sign there.
    """
    return config.resilience.max_nonfinite_steps or (10 if config.precision.fp16 else 1)


class StopDiverged(Callback):
    """Ends a run whose loss or gradients stay infinite or not a number. Stands before SaveCheckpoints: nothing is saved then."""

    def __init__(self, again: Callable[[], str]):
        """again: what the next start does, in words."""
        self.again, self.count = again, 0

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Count; raise TrainingError where it is enough."""
        if not record.skipped:
            self.count = 0
        self.count += record.lasting
        most = most_nonfinite(run.config)
        if record.step == run.train_iters:  # a run that has no more steps is not all done where none of them was finite
            most = min(most, record.step - run.start_step)
        if not run.config.resilience.check_for_nan_in_loss_and_grad or self.count < most:
            return
        scaled = f", at loss scale {record.loss_scale:g}" if run.config.precision.fp16 else ""
        found = f"loss {record.total_loss:g}, gradient norm {record.grad_norm:g}{scaled}"
        cure = (
            f"Give a lower --lr (it was {record.learning_rate:g}; with --override-opt-param-scheduler) or more warm-up"
        )
        if (
            math.isfinite(record.total_loss) and record.loss_scale > 1.0
        ):  # the loss is a number, so the weights may well be good
            fixed = run.config.precision.loss_scale is not None
            cure = "Drop --loss-scale for a dynamic one, or lower it" if fixed else "Lower --min-loss-scale"
        times = f"{most} steps in a row have" if most > 1 else "a step has"
        raise TrainingError(
            f"step {record.step}: found {found}; the run has diverged: {times} a loss or gradients that are not finite "
            f"(--max-nonfinite-steps). Nothing was saved or deleted since. {cure}: "
            f"{self.again()}. If it fails there at once, --ckpt-step goes further back."
        )


class StopUnlearned(Callback):
    """Tells of steps whose batch has no token that counts, and ends a run that has only those."""

    def __init__(self) -> None:
        self.count = 0

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Count; tell of the first, raise TrainingError where it is enough."""
        self.count = self.count + 1 if record.uncounted else 0
        if not record.uncounted:
            return
        what, found = (
            f"step {record.step}, {' and '.join(record.uncounted)}",
            f"no token of {record.global_batch_size} samples counts",
        )
        cure = "Look at the loss mask: --eod-mask-loss, the end-of-document id of the data and of the tokenizer, padding, --mask-prob"
        if self.count >= EMPTY_STEPS:
            raise TrainingError(f"{what}: {found}, {EMPTY_STEPS} steps in a row; there is nothing to learn. {cure}.")
        if self.count == 1 and run.rank == 0:
            print(
                f"megalith: {what}: {found} (all are masked), so it is not a number. {cure}.",
                file=sys.stderr,
                flush=True,
            )


class Retain(Callback):
    """Deletes old checkpoints once the newest is known to be good: when a step or a validation from its weights is finite.

    Until then one more is kept: of --keep-last 1 the last good one would go for one that is the first of a divergence. A run that
    ends right after its save, and measures nothing then, leaves that to the next start, whose first step judges what it
    went on from.
    """

    def __init__(self, retain: Callable[[], None], progress: Progress):
        """retain: delete what is kept no longer."""
        self.retain, self.progress = retain, progress
        self.start, self.retained = progress.iteration, 0

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """A step that changed weights says that those before it were good."""
        if not record.skipped:
            self.prune()

    def on_validation(self, run: RunInfo, record: ValidationRecord) -> None:
        """So does a loss that is a number. Who only measures deletes nothing."""
        if math.isfinite(record.total_loss) and self.progress.saved is not None:
            self.prune()

    def prune(self) -> None:
        """Delete, once for each checkpoint."""
        newest = self.start if self.progress.saved is None else self.progress.saved
        if newest != self.retained:
            self.retained = newest
            self.retain()
