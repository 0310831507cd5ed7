"""TensorBoard scalars under Megatron's names, for `--tensorboard-dir`."""

from __future__ import annotations

from typing import Any

from megalith.common.extras import require
from megalith.training.callbacks import Callback, RunInfo, StepRecord, ValidationRecord, perplexity


class TensorBoard(Callback):
    """Each scalar twice, over steps and over samples (' vs samples'), except the time of a step."""

    def __init__(self, directory: str):
        self.directory = directory
        self.writer: Any = None

    def on_start(self, run: RunInfo) -> None:
        """Open the directory; after a resume, TensorBoard hides the steps that will be done again.

        Raises MissingPackage without the package.
        """
        if not run.writes:
            return
        library = require("torch.utils.tensorboard", "--tensorboard-dir", package="tensorboard")
        self.writer = library.SummaryWriter(self.directory, purge_step=run.start_step + 1 if run.start_step else None)

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Queue the step's numbers; the writer's thread writes them."""
        if not self.writer:
            return
        scalars: dict[str, float | None] = {
            "learning-rate": record.learning_rate,
            "batch-size": record.global_batch_size,
            **record.losses,
            **record.metrics,
            "loss-scale": record.loss_scale,
            "world-size": run.world_size,
            "grad-norm": record.grad_norm,
            "num-zeros": record.zeros,
            "params-norm": record.params_norm,
        }
        self._add(scalars, record.step, record.consumed_samples)
        self.writer.add_scalar("iteration-time", record.seconds, record.step)

    def on_validation(self, run: RunInfo, record: ValidationRecord) -> None:
        """Queue losses and perplexities, and metrics."""
        if self.writer:
            values = {f"{name} {record.split}": value for name, value in (record.losses | record.metrics).items()}
            values |= {f"{name} {record.split} ppl": perplexity(value) for name, value in record.losses.items()}
            self._add(values, record.step, record.consumed_samples)
            self.writer.flush()

    def on_end(self, run: RunInfo) -> None:
        """Write what is queued."""
        if self.writer:
            self.writer.close()
            self.writer = None

    def _add(self, scalars: dict[str, Any], step: int, samples: int) -> None:
        for name, value in scalars.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)
                self.writer.add_scalar(f"{name} vs samples", value, samples)
