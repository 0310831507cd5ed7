"""Losses of models that classify sequences, for finetuning."""

from __future__ import annotations

from torch import Tensor

from megalith.training.tasks import Batch, MetricSums, Task, sample_mask


class Classification(Task):
    """Cross entropy of the class of each sequence, or of the right one among several choices, averaged over the
    global batch.

    Batches have `input_ids` and `labels` [b], and may have `positions`, `token_types`, `padding_mask`, and `loss_mask`
    [b], 1 for the samples that count. Reports the accuracy too.
    """

    metric_names = ("accuracy",)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Samples, each counted on the process that has its first token."""
        return {"classification loss": sample_mask(batch, "loss_mask").sum() * first_token_is_here(batch)}

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """Weights are 1 / global count, so that the model's losses need only be added up."""
        names = ("positions", "token_types", "padding_mask", "labels")
        passed: Batch = {name: batch[name] for name in names if name in batch}
        weights = sample_mask(batch, "loss_mask") / counts["classification loss"].clamp(min=1.0)
        return {"inputs": batch["input_ids"], **passed, "loss_weights": weights}

    def losses(self, output: tuple[Tensor, Tensor], batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """output: weighted losses [b], and logits [b, classes]."""
        return {"classification loss": output[0].sum()}

    def metrics(self, output: tuple[Tensor, Tensor], batch: Batch) -> dict[str, MetricSums]:
        """The fraction of samples whose largest logit is that of their label."""
        counted = sample_mask(batch, "loss_mask") * first_token_is_here(batch)
        right = output[1].argmax(dim=-1) == batch["labels"]
        return {"accuracy": ((right * counted).sum(), counted.sum())}


def first_token_is_here(batch: Batch) -> Tensor | float:
    """1 where the first tokens of the sequences are on this process, else 0."""
    return (batch["coordinates"][0] == 0).float() if "coordinates" in batch else 1.0
