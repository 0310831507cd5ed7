"""Callbacks that stop a run that has diverged or learns nothing, and keep the good checkpoints before that."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from megalith.common.errors import TrainingError
from megalith.config.run import RunConfig
from megalith.training.callbacks import Callback, RunInfo, StepRecord, ValidationRecord
from megalith.training.resume.state import Progress

MAX_EMPTY_STEPS = 10  # steps in a row without anything to learn that end a run


def nonfinite_limit(config: RunConfig) -> int:
    """How many steps in a row that are not finite, and that no smaller loss scale can help, end a run.

    Float16 overflows now and then on an unusual batch, so that one such step is no sign of divergence there.
    """
    return config.resilience.max_nonfinite_steps or (10 if config.precision.fp16 else 1)


class StopDiverged(Callback):
    """Ends a run whose loss or gradients stay infinite or not a number.

    It comes before SaveCheckpoints, so that nothing is saved then.
    """

    def __init__(self, next_start: Callable[[], str]):
        """next_start: what the next start does, as text."""
        self.next_start, self.count = next_start, 0

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Count; raise TrainingError where it is enough."""
        if not record.skipped:
            self.count = 0
        self.count += record.scale_cannot_help
        most = nonfinite_limit(run.config)
        if record.step == run.train_iters:  # a run shorter than the limit has failed if none of its steps was finite
            most = min(most, record.step - run.start_step)
        if not run.config.resilience.check_for_nan_in_loss_and_grad or self.count < most:
            return
        scaled = f", at loss scale {record.loss_scale:g}" if run.config.precision.fp16 else ""
        found = f"loss {record.total_loss:g}, gradient norm {record.grad_norm:g}{scaled}"
        cure = (
            f"Give a lower --lr (it was {record.learning_rate:g}; with --override-opt-param-scheduler) or more warm-up"
        )
        if math.isfinite(record.total_loss) and record.loss_scale > 1.0:  # then the weights may well be good
            fixed = run.config.precision.loss_scale is not None
            cure = "Drop --loss-scale for a dynamic one, or lower it" if fixed else "Lower --min-loss-scale"
        times = f"{most} steps in a row have" if most > 1 else "a step has"
        raise TrainingError(
            f"Step {record.step}: the run has diverged, as {times} a loss or gradients that are not finite "
            f"(--max-nonfinite-steps); found {found}. Nothing was saved or deleted since. {cure}: "
            f"{self.next_start()}. If it fails there at once, --ckpt-step goes further back."
        )


class StopEmptyBatches(Callback):
    """Warns of steps whose batch has no token that counts, and ends a run that has only those."""

    def __init__(self) -> None:
        self.count = 0

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Count; warn of the first, raise TrainingError where it is enough."""
        self.count = self.count + 1 if record.empty_losses else 0
        if not record.empty_losses:
            return
        what = f"Step {record.step}, {' and '.join(record.empty_losses)}"
        found = f"no token of {record.global_batch_size} samples counts"
        settings = "--eod-mask-loss, the end-of-document id of the data and of the tokenizer, padding, --mask-prob"
        cure = f"Check the loss mask: {settings}"
        if self.count >= MAX_EMPTY_STEPS:
            row = f"{MAX_EMPTY_STEPS} steps in a row"
            raise TrainingError(f"{what}: {found}, {row}; there is nothing to learn. {cure}.")
        if self.count == 1 and run.rank == 0:
            print(
                f"megalith: {what}: {found} (all are masked), so it is not a number. {cure}.",
                file=sys.stderr,
                flush=True,
            )


class PruneCheckpoints(Callback):
    """Deletes old checkpoints once the newest is known to be good: a step or validation from its weights is finite.

    Until then one more is kept: with --keep-last 1 the last good one would otherwise be deleted for the first one of a
    diverged run. A run that ends right after its save, and validates nothing then, leaves that to the next start, whose
    first step shows whether the checkpoint it resumed from is good.
    """

    def __init__(self, prune_old: Callable[[], None], progress: Progress):
        """prune_old: deletes the checkpoints that are no longer kept."""
        self.prune_old, self.progress = prune_old, progress
        self.start, self.pruned_at = progress.iteration, 0

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """A step that changed weights shows that the weights before it were good."""
        if not record.skipped:
            self.prune()

    def on_validation(self, run: RunInfo, record: ValidationRecord) -> None:
        """So does a finite loss. A run that only validates deletes nothing."""
        if math.isfinite(record.total_loss) and self.progress.saved is not None:
            self.prune()

    def prune(self) -> None:
        """Delete, once for each checkpoint."""
        newest = self.start if self.progress.saved is None else self.progress.saved
        if newest != self.pruned_at:
            self.pruned_at = newest
            self.prune_old()
