"""metrics.jsonl: one object per step and per validation, from which pictures and comparisons are made."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from megalith.common.files import atomic_path
from megalith.common.json_lines import parse
from megalith.training.callbacks import Callback, RunInfo, StepRecord, ValidationRecord

METRICS_FILE = "metrics.jsonl"


class Metrics(Callback):
    """Writes the file during the run, a line at a time, unbuffered.

    So a killed run loses no line, and leaves at most half of one.
    After a resume the lines of steps beyond the checkpoint are dropped first, since those steps will be done again
    (unless the run only validates: then none is dropped). A number that is infinite or not a number is null (JSON has
    neither).
    """

    def __init__(self) -> None:
        self.file: BinaryIO | None = None

    def on_start(self, run: RunInfo) -> None:
        """Drop what this run will do again, and open the file."""
        if run.writes:
            run.folder.mkdir(parents=True, exist_ok=True)
            path = run.folder / METRICS_FILE
            drop_after(path, math.inf if run.config.validation.skip_train else run.start_step)
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in on_end

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Append the step.

        `loss` is the total; `losses` are its parts, where there are several; `metrics` what is not minimised.
        """
        if self.file:
            line: dict[str, Any] = {
                "step": record.step,
                "loss": record.total_loss,
                "grad_norm": record.grad_norm,
                "learning_rate": record.learning_rate,
                "tokens": record.tokens,
                "seconds": record.seconds,
                "consumed_samples": record.consumed_samples,
                "global_batch_size": record.global_batch_size,
                "weight_decay": record.weight_decay,
                "loss_scale": record.loss_scale,
                "skipped": record.skipped,
            }
            line |= {"losses": record.losses} if len(record.losses) > 1 else {}
            line |= {"metrics": record.metrics} if record.metrics else {}
            line |= {"params_norm": record.params_norm} if record.params_norm is not None else {}
            line |= {"zeros": record.zeros} if record.zeros is not None else {}
            self.file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def on_validation(self, run: RunInfo, record: ValidationRecord) -> None:
        """Append the validation; its keys begin with the name of the split, to tell them from a step's.

        `data` is a hash of validation data that come by name; `skip_train` says that the run did nothing but measure.
        """
        if self.file:
            line: dict[str, Any] = {"step": record.step}
            line |= {f"{record.split}_loss": record.total_loss} if record.losses else {}
            line |= {f"{record.split}_losses": record.losses} if len(record.losses) > 1 else {}
            line |= {f"{record.split}_metrics": record.metrics} if record.metrics else {}
            line |= {"seconds": record.seconds, "consumed_samples": record.consumed_samples}
            line |= {"data": run.valid_data} if run.valid_data is not None else {}
            line |= {"skip_train": True} if run.config.validation.skip_train else {}
            self.file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def on_end(self, run: RunInfo) -> None:
        """Close the file."""
        if self.file:
            self.file.close()
            self.file = None


def read_metrics(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The objects of a metrics file, steps and validations in the order of time; a truncated line is skipped."""
    with open(path, "rb") as file:
        for line in file:
            try:
                yield parse(line)
            except ValueError:
                continue


def measured(path: pathlib.Path, data: str | None) -> Iterator[dict[str, Any]]:
    """The validations that a training run made on these data (`RunInfo.valid_data`); none where the file is missing.

    Lines that do not name their data count: of corpora, and of older releases.
    """
    for line in read_metrics(path) if path.exists() else ():
        if "loss" not in line and line.get("data", data) == data and not line.get("skip_train"):
            yield line


def splits_measured_at(path: pathlib.Path, step: int, data: str | None = None) -> set[str]:
    """The splits ("validation", "test") whose loss at this step the file has, of these data; see `measured`."""
    lines = [line for line in measured(path, data) if line["step"] == step]
    return {split for line in lines for split in ("validation", "test") if f"{split}_loss" in line}


def drop_after(path: pathlib.Path, step: float) -> None:
    """Remove, atomically, every line of a later step and every truncated line. A missing file is no error."""
    if not path.exists():
        return
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for line in read_metrics(path):
            if line["step"] <= step:
                file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
