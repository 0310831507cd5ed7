"""The checkpoint that is best on validation data: saved when it is found, kept, named at the end of the run."""

from __future__ import annotations

import pathlib

from megalith.checkpoint.store.folder import checkpoint_folder, checkpoint_paths, iteration_of
from megalith.config.run import RunConfig
from megalith.training.callbacks import Callback, RunInfo, ValidationRecord
from megalith.training.duties import SaveCheckpoints
from megalith.training.reporting.metrics import METRICS_FILE, measured
from megalith.training.resume.state import Best, Progress


class KeepBest(Callback):
    """Saves a step whose validation is better than every one before, unless it is saved already.

    `Progress.best` names it, which keeps it from being deleted. It hears of validations, and so comes after Validate.
    """

    def __init__(self, saver: SaveCheckpoints, progress: Progress, metric: str | None):
        """metric: the one whose highest value is the best; None: the lowest loss."""
        self.saver, self.progress, self.metric = saver, progress, metric

    def on_validation(self, run: RunInfo, record: ValidationRecord) -> None:
        """Compare, and save. The measurement before the first step has no checkpoint."""
        if record.split != "validation" or record.step == 0:
            return
        value = record.total_loss if self.metric is None else record.metrics[self.metric]
        found = Best(record.step, self.metric or "loss", value, highest=self.metric is not None)
        if found.better_than(self.progress.best):
            self.progress.best = found
            if self.saver.saved_at != record.step:
                self.saver.write()


def best_so_far(config: RunConfig, step: int, metric: str | None, data: str | None = None) -> Best | None:
    """The best validation up to a step, as metrics.jsonl has it, of those whose checkpoint is there; None: no such.

    data: as `RunInfo.valid_data`; what was measured on other data is not compared with it. For the process that sees
    the run's folders.
    """
    path = pathlib.Path(config.run_folder) / METRICS_FILE
    best: Best | None = None
    there = {iteration_of(each) for each in checkpoint_paths(checkpoint_folder(config))}
    for line in measured(path, data):
        value = line.get("validation_loss") if metric is None else line.get("validation_metrics", {}).get(metric)
        if value is not None and line["step"] <= step and line["step"] in there:
            found = Best(line["step"], metric or "loss", value, highest=metric is not None)
            best = found if found.better_than(best) else best
    return best
