"""Losses of models that classify sequences, or give each a number, for finetuning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.config.run import RunConfig
from megalith.data.tasks.description import read_description
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.runtime.build import Mesh
from megalith.training.tasks import Batch, MetricSums, Task, sample_mask


class Classification(Task):
    """Cross entropy of the class of each sequence, or of the right one among several choices, averaged over the
    global batch.

    Batches have `input_ids` and `labels` [b], and may have `positions`, `token_types`, `padding_mask`, and `loss_mask`
    [b], 1 for the samples that count. Reports the accuracy, and the metrics of the task that --task names.
    """

    loss_name = "classification loss"
    metric_names: Sequence[str] = ("accuracy",)
    best_metric: str | None = "accuracy"
    classes = 0  # of a task's labels

    def setup(self, config: RunConfig, mesh: Mesh, tokenizer: Tokenizer | None) -> None:
        """Take the metrics of the task."""
        if config.finetuning.task is None or config.data.dataset != "classification":
            return
        task = read_description(config.finetuning.task)
        self.metric_names = tuple(dict.fromkeys((*task.metrics, *self.metric_names)))
        self.best_metric, self.classes = task.metrics[0], task.classes
        self.metric_sizes = {"f1": 3, "matthews": task.classes**2, "pearson": 6}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Samples, each counted on the process that has its first token."""
        return {self.loss_name: counted_samples(batch).sum()}

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """Weights are 1 / global count, so that the model's losses need only be added up."""
        names = ("positions", "token_types", "padding_mask", "labels")
        passed: Batch = {name: batch[name] for name in names if name in batch}
        weights = sample_mask(batch, "loss_mask") / counts[self.loss_name].clamp(min=1.0)
        return {"inputs": batch["input_ids"], **passed, "loss_weights": weights}

    def losses(self, output: tuple[Tensor, Tensor], batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """output: weighted losses [b], and logits [b, classes]."""
        return {self.loss_name: output[0].sum()}

    def metrics(self, output: tuple[Tensor, Tensor], batch: Batch) -> dict[str, MetricSums]:
        """The sums of each of `metric_names`, of the classes with the largest logit."""
        counted, labels, predicted = counted_samples(batch), batch["labels"], output[1].argmax(dim=-1)
        found: dict[str, MetricSums] = {"accuracy": (((predicted == labels) * counted).sum(), counted.sum())}
        if "f1" in self.metric_names:  # of class 1: found, found wrongly, missed
            pairs = ((1, 1), (0, 1), (1, 0))
            found["f1"] = [(((labels == true) & (predicted == other)) * counted).sum() for true, other in pairs]
        if "matthews" in self.metric_names:
            cells = F.one_hot(labels * self.classes + predicted, self.classes**2)
            found["matthews"] = (cells * counted[:, None]).sum(dim=0).unbind()
        return found

    def metric(self, name: str, sums: Sequence[float]) -> float:
        """A metric, of its sums over the global batch."""
        if name == "f1":
            right, wrong, missed = sums
            return 2 * right / (2 * right + wrong + missed) if any(sums) else 0.0
        return matthews(sums, self.classes) if name == "matthews" else super().metric(name, sums)

    def predictions(self, output: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """The probability of each class, or choice, [b, classes]."""
        return output[1].float().softmax(dim=-1)


class Regression(Classification):
    """Squared error of a number for each sequence, from the head of one class, averaged over the global batch.

    As transformers' heads with one label. Batches are as those of Classification, with `labels` [b] float.
    """

    loss_name = "regression loss"
    metric_names: Sequence[str] = ()
    best_metric: str | None = None

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """The model is given no labels, and returns logits."""
        passed = super().inputs(batch, counts)
        return {name: value for name, value in passed.items() if name not in ("labels", "loss_weights")}

    def losses(self, output: Tensor, batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """output: logits [b, 1]."""
        errors = (numbers(output) - batch["labels"]).square() * counted_samples(batch)
        return {self.loss_name: errors.sum() / counts[self.loss_name].clamp(min=1.0)}

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, MetricSums]:  # type: ignore[override]
        """The sums of Pearson's correlation, in float64: their differences are small."""
        if "pearson" not in self.metric_names:
            return {}
        counted, x, y = counted_samples(batch).double(), numbers(output).double(), batch["labels"].double()
        parts = (torch.ones_like(x), x, y, x * x, y * y, x * y)
        return {"pearson": [(part * counted).sum() for part in parts]}

    def metric(self, name: str, sums: Sequence[float]) -> float:
        """A metric, of its sums over the global batch."""
        return pearson(sums)

    def predictions(self, output: Tensor, batch: Batch) -> Tensor:  # type: ignore[override]
        """The numbers, [b, 1]."""
        return numbers(output)[:, None]


def numbers(output: Tensor) -> Tensor:
    """Logits [b, 1] as numbers [b], float32 at least."""
    return output[:, 0].to(torch.promote_types(output.dtype, torch.float32))


def counted_samples(batch: Batch) -> Tensor:
    """float32 [b]: 1 for each sample that counts, on the process that has its first token."""
    return sample_mask(batch, "loss_mask") * first_token_is_here(batch)


def first_token_is_here(batch: Batch) -> Tensor | float:
    """1 where the first tokens of the sequences are on this process, else 0."""
    return (batch["coordinates"][0] == 0).float() if "coordinates" in batch else 1.0


def matthews(cells: Sequence[float], classes: int) -> float:
    """Matthews' correlation of any number of classes (Gorodkin, 2004) from the confusion matrix, row by row.

    0 where all labels, or all predictions, are one class, as GLUE's scorer has it.
    """
    rows = [cells[at * classes : (at + 1) * classes] for at in range(classes)]
    true, predicted = [sum(row) for row in rows], [sum(column) for column in zip(*rows)]
    total, right = sum(true), sum(rows[at][at] for at in range(classes))
    covariance = right * total - sum(t * p for t, p in zip(true, predicted))
    spread = (total**2 - sum(p * p for p in predicted)) * (total**2 - sum(t * t for t in true))
    return covariance / math.sqrt(spread) if spread else 0.0


def pearson(sums: Sequence[float]) -> float:
    """Pearson's correlation from the sums of 1, x, y, x x, y y, x y; not a number where x or y is constant."""
    n, x, y, xx, yy, xy = sums
    spread = (n * xx - x * x) * (n * yy - y * y)
    return (n * xy - x * y) / math.sqrt(spread) if spread > 0.0 else math.nan
