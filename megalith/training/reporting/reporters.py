"""The callbacks that every run has."""

from __future__ import annotations

from megalith.config.run import RunConfig
from megalith.training.callbacks import Callback
from megalith.training.reporting.log_lines import LogLines
from megalith.training.reporting.metrics import Metrics
from megalith.training.reporting.plot import LossPlot
from megalith.training.reporting.progress import ProgressDisplay
from megalith.training.reporting.tensorboard import TensorBoard


def reporters(config: RunConfig) -> list[Callback]:
    """Callbacks for metrics.jsonl, log lines, the progress display and loss.png, and TensorBoard if asked for."""
    callbacks: list[Callback] = [Metrics(), LogLines(), ProgressDisplay(), LossPlot()]
    if config.logging.tensorboard_dir:
        callbacks.append(TensorBoard(config.logging.tensorboard_dir))
    return callbacks
