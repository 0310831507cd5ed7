"""The losses of a model on data it does not train on."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch

from megalith.config.batch_math import global_batch
from megalith.config.run import RunConfig
from megalith.data.loader import Loader
from megalith.training.forward_backward import global_counts, run_micro_batches
from megalith.training.resume.state import Progress
from megalith.training.step import Trainer, decode_stop, encode_stop
from megalith.training.tasks import Task

StopReason = Callable[[], str | None]  # why this process asks that the run end, if it does
SPLITS = {"validation": "valid", "test": "test"}  # what is measured -> the dataset's name
PART = "validation/"  # what the names of validation data begin with that is measured whole, by name


class Evaluation(NamedTuple):
    """What was measured, by name, equal on every process: mean losses, and metrics.

    parts: of all of --valid-data, what was measured of each of several files.
    """

    losses: dict[str, float]
    metrics: dict[str, float]
    parts: Mapping[str, Evaluation] = MappingProxyType({})


class ValidationIncomplete(Exception):
    """A validation that stopped before its end, on every process: for a stop `reason`, or as data could not be read."""

    def __init__(self, message: str, reason: str | None = None):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass
class Cursor:
    """Where validations read: each takes the next samples, as Megatron's does, and starts over after the last full set.

    The position is kept in `progress`, and so in checkpoints. Megatron does not validate before the first step, so the
    samples of that validation are not counted.
    """

    progress: Progress
    samples: int  # of one validation, over all processes
    interval: int  # steps from one validation to the next
    length: int  # of the dataset, in samples

    def due(self) -> bool:
        """Whether a validation is due after the present step; its samples are counted by then (`advance`)."""
        return self.progress.iteration > 0 and self.progress.iteration % self.interval == 0

    def advance(self) -> None:
        """Count the samples of a validation that is due, before the step is saved and before they are read."""
        self.progress.consumed_valid_samples += self.samples
        self.progress.counted_validation = self.progress.iteration

    @property
    def first(self) -> int:
        """The first sample of the validation that is measured now."""
        counted, last = self.progress.consumed_valid_samples, self.progress.counted_validation
        present = last == self.progress.iteration if last is not None or not counted else self.due()
        number = counted // self.samples - present
        return number % max(1, self.length // self.samples) * self.samples


def measured_splits(config: RunConfig, loaders: Mapping[str, Loader]) -> list[str]:
    """What is measured, "validation" and "test": where there is such data, and --eval-iters asks for it."""
    found = {split for split, name in SPLITS.items() if name in loaders}
    found |= {"validation"} if whole_sets(loaders) else set()
    return [split for split in SPLITS if config.validation.eval_iters and split in found]


def whole_sets(loaders: Mapping[str, Loader]) -> dict[str, Loader]:
    """{name: loader} of the validation data that is measured whole, that without labels left out."""
    sets = {name: loader for name, loader in loaders.items() if name.startswith(PART)}
    return {name: loader for name, loader in sets.items() if getattr(loader.dataset.dataset, "labelled", True)}


class Validation:
    """Measures a model on validation data, each time on other samples of it, and on test data, always the same.

    Validation data of a task's files (data/samples/epochs.py) are measured whole each time, all together and by name.
    """

    def __init__(self, trainer: Trainer, progress: Progress, loaders: Mapping[str, Loader], stop: StopReason):
        """loaders: "valid" and "test", or "validation/NAME" for each file, where there is such data."""
        config = trainer.runtime.config
        self.trainer, self.loaders, self.stop = trainer, loaders, stop
        self.splits, self.whole = measured_splits(config, loaders), whole_sets(loaders)
        self.batches, self.batch = config.validation.eval_iters, global_batch(config, trainer.runtime.mesh.data_size)
        self.cursor: Cursor | None = None
        if "validation" in self.splits and not self.whole:
            samples, length = self.batches * self.batch, len(loaders["valid"].dataset)
            self.cursor = Cursor(progress, samples, config.validation.interval, length)

    def measure(self, split: str) -> Evaluation:
        """Losses and metrics of "validation" or "test"; see evaluate."""
        if split == "validation" and self.whole:
            return self.measure_whole()
        first = self.cursor.first if split == "validation" and self.cursor else 0
        return evaluate(self.trainer, self.loaders[SPLITS[split]], first, self.batches, self.batch, self.stop)

    def measure_whole(self) -> Evaluation:
        """Of all files together, each sample of them once; `parts` where there are several."""
        task = self.trainer.task
        found = {
            name: add_up(self.trainer, loader, 0, len(loader.dataset) // self.batch, self.batch, self.stop)
            for name, loader in self.whole.items()
        }
        parts = {name: each.evaluation(task) for name, each in found.items()} if len(found) > 1 else {}
        names = next(iter(found.values())).names
        columns = ([each.counts for each in found.values()], [each.sums for each in found.values()])
        counts, sums = ([sum(column) for column in zip(*rows)] for rows in columns)
        return Totals(names, counts, sums).evaluation(task)._replace(parts=parts)


class Totals(NamedTuple):
    """Sums over some samples. sums: those of the losses by name, then those of the metrics."""

    names: list[str]
    counts: Sequence[float]
    sums: Sequence[float]

    def evaluation(self, task: Task) -> Evaluation:
        """Means and metrics."""
        losses = zip(self.names, self.sums, self.counts)
        means = {name: value / count if count else math.nan for name, value, count in losses}
        return Evaluation(means, task.metrics_of(self.sums[len(self.names) :]))


def evaluate(
    trainer: Trainer, loader: Loader, start: int, batches: int, global_batch_size: int, stop: StopReason = lambda: None
) -> Evaluation:  # fmt: skip
    """Losses and metrics over `batches` global batches from sample `start` on, weighted as in training: by token.

    They do not depend on the number of processes. A loss without unmasked tokens is not a number. stop: called before
    every batch. Raises ValidationIncomplete on all processes where any gives a reason, or cannot read its part.
    """
    return add_up(trainer, loader, start, batches, global_batch_size, stop).evaluation(trainer.task)


@torch.no_grad()
def add_up(
    trainer: Trainer, loader: Loader, start: int, batches: int, global_batch_size: int, stop: StopReason
) -> Totals:  # fmt: skip
    """The sums that `evaluate` divides, equal on every process."""
    runtime, task = trainer.runtime, trainer.task
    runtime.train(False)
    sums, totals = torch.zeros((), dtype=torch.float64, device=trainer.device), dict[str, torch.Tensor]()
    for number in range(batches):
        micro_batches = read_batches(trainer, loader, start + number * global_batch_size, global_batch_size, stop())
        parts = [runtime.prepare_batch(batch, task.sequences) for batch in micro_batches]
        counts = global_counts(runtime, task, parts)
        found = run_micro_batches(runtime, task, parts, counts, 0, train=False)
        counted = torch.stack(list(counts.values())).double()
        weights = torch.cat((counted, counted.new_ones(len(found) - len(counted))))
        sums = sums + found * weights
        for name, count in counts.items():
            totals[name] = totals.get(name, 0.0) + count.double()
    numbers = runtime.mesh.all_reduce(sums).tolist()
    runtime.train()
    for name in [name for name, total in totals.items() if float(total) == 0.0 and runtime.mesh.is_main_process]:
        samples = batches * global_batch_size
        print(f"megalith: no token of {samples} samples counts for the {name} (all are masked): it is not a number",
              file=sys.stderr, flush=True)  # fmt: skip
    return Totals(list(totals), [float(total) for total in totals.values()], numbers)


def read_batches(
    trainer: Trainer, loader: Loader, start: int, size: int, reason: str | None
) -> list[dict[str, torch.Tensor]]:
    """This process's micro-batches of a batch.

    Raises ValidationIncomplete on all processes where one could not read its part, or has a reason to stop.
    """
    batches, failure = list[dict[str, torch.Tensor]](), ""
    if reason is None:
        try:
            batches = loader.step(start, size)
        except Exception as error:
            failure = f"samples {start} to {start + size - 1}: {type(error).__name__}: {error}"
            print(f"megalith: validation data could not be read, {failure}", file=sys.stderr, flush=True)
    flags = torch.tensor([*encode_stop(reason), float(bool(failure))], dtype=torch.float32, device=trainer.device)
    *reasons, failed = trainer.runtime.mesh.all_reduce(flags).tolist()
    if reason := decode_stop(reasons):
        raise ValidationIncomplete(reason, reason)
    if failed:
        samples = f"samples {start} to {start + size - 1}"
        raise ValidationIncomplete(failure or f"another process could not read its part of {samples}")
    return batches
