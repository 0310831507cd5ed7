"""What a model predicts of each sample of its validation files: tables, confusion matrices, a JSON file."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
import torch
from torch import Tensor

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import TrainingError
from megalith.common.files import write_text
from megalith.data.loader import Loader
from megalith.training.callbacks import Callback, RunInfo, ValidationRecord, print_lines
from megalith.training.forward_backward import global_counts, model_arguments
from megalith.training.resume.state import Progress
from megalith.training.step import Trainer
from megalith.training.validation import PART, ValidationIncomplete, read_batches

RESULTS_FILE = "results.json"


class WritePredictions(Callback):
    """At the end of the run, predicts every sample of the validation files and writes what a dataset makes of it.

    Beside predictions_NAME of each file there is results.json: losses and metrics at the end, confusion matrices, the
    rows that were left out. The main process writes.
    """

    def __init__(self, trainer: Trainer, progress: Progress, loaders: Mapping[str, Loader], batch: int, train: Any):
        """loaders: of validation data that are read whole. batch: the global batch. train: the training dataset."""
        self.trainer, self.progress, self.loaders, self.batch = trainer, progress, loaders, batch
        self.train, self.measured = train, dict[str, ValidationRecord]()

    def on_validation(self, run: RunInfo, record: ValidationRecord) -> None:
        """Keep the last of each name."""
        self.measured[record.split] = record

    def on_end(self, run: RunInfo) -> None:
        """Predict and write, unless the run ends early."""
        if self.progress.stop is not None:
            return
        results: dict[str, Any] = {
            "step": self.progress.iteration, "data": run.valid_data, "validation": self.numbers_of("validation")
        }  # fmt: skip
        for name, loader in self.loaders.items():
            results[name] = self.write(run, name, loader)
        results["left_out"] = [
            row._asdict() for dataset in (self.train, *(each.dataset.dataset for each in self.loaders.values()))
            for row in getattr(dataset, "bad", ())
        ]  # fmt: skip
        text = orjson.dumps(results, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()
        Ranks().on_rank_0(lambda: write_text(run.folder / RESULTS_FILE, text))

    def numbers_of(self, split: str) -> dict[str, Any]:
        """Losses and metrics of the present step, as far as they were measured; of one file, those of all."""
        record = self.measured.get(split) or self.measured.get("validation")
        if record is None or record.step != self.progress.iteration:
            return {}
        return {**record.losses, **record.metrics}

    def write(self, run: RunInfo, name: str, loader: Loader) -> dict[str, Any]:
        """Predict one file and write its table; what results.json has of it."""
        dataset = loader.dataset.dataset
        try:
            found = predict(self.trainer, loader, self.batch)
        except ValidationIncomplete as error:
            raise TrainingError(f"{name}: not predicted, as its data could not be read: {error}") from error
        labelled = getattr(dataset, "labelled", True)
        path = run.folder / f"predictions_{name.removeprefix(PART)}.tsv"

        def finish(parts: list[dict[int, list[float]]]) -> dict[str, Any]:
            rows = {number: values for part in parts for number, values in part.items()}
            return dataset.write_predictions(path, [rows[number] for number in range(len(dataset))])

        summary = Ranks().collect(lambda: found, finish)
        if run.rank == 0:
            print_lines(*summary.pop("lines", ()))
        summary.pop("lines", None)
        return {"examples": len(dataset), **(self.numbers_of(name) if labelled else {}), **summary}


@torch.no_grad()
def predict(trainer: Trainer, loader: Loader, batch: int) -> dict[int, list[float]]:
    """{number of the sample: what Task.predictions gives} of the samples whose output this process has.

    Every process calls it; together they have every sample once, and with it those that fill the last batch.
    """
    runtime, task, found = trainer.runtime, trainer.task, dict[int, list[float]]()
    runtime.train(False)
    step = torch.tensor(0, device=trainer.device)
    for start in range(0, len(loader.dataset), batch):
        read = read_batches(trainer, loader, start, batch, None)
        batches = [runtime.prepare_batch(each, task.sequences) for each in read]
        counts = global_counts(runtime, task, batches)
        inputs = [model_arguments(task, each, counts) | {"step": step} for each in batches]
        runtime.run(inputs, _keeper(trainer, batches, found), train=False)
    runtime.train()
    return found


def _keeper(
    trainer: Trainer, batches: Sequence[Mapping[str, Tensor]], found: dict[int, list[float]]
) -> Callable[[Any, int], Tensor]:
    """What is called in the place of a loss."""

    def keep(output: Any, number: int) -> Tensor:
        batch = dict(batches[number])
        first = "coordinates" not in batch or int(batch["coordinates"][0]) == 0
        if first and trainer.runtime.mesh.rank("tp") == 0:
            values = trainer.task.predictions(output, batch)
            if values is not None:
                found.update(zip(batch["samples"].tolist(), values.tolist(), strict=True))
        return torch.zeros((), device=trainer.device)

    return keep


def has_predicted(folder: pathlib.Path, step: int, data: str | None) -> bool:
    """Whether a run's folder has the predictions of a step, of these data (`RunInfo.valid_data`)."""
    try:
        found = orjson.loads((folder / RESULTS_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return (found.get("step"), found.get("data", data)) == (step, data)


def can_predict(loaders: Mapping[str, Loader]) -> dict[str, Loader]:
    """Those of validation data whose dataset knows how to write predictions."""
    whole = {name: loader for name, loader in loaders.items() if name.startswith(PART)}
    return {name: loader for name, loader in whole.items() if hasattr(loader.dataset.dataset, "write_predictions")}
