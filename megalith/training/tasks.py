"""What is learned from a batch. A task is three small functions; a user's own goes by `module:name`.

A loss is a sum over the whole global batch divided by a count over the whole global batch, so the count must be known
before the first backward pass: `counts` is asked for every micro-batch, and what comes back is summed over all processes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megalith.common.registry import Registry

Batch = dict[str, Tensor]  # of one micro-batch; b samples of s tokens (with context parallelism, this process's part of them)


class Task(Protocol):
    """A loss, or several, by name."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What each loss of this micro-batch is to be divided by, before division: {name: number of tokens, say}."""

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """The model's arguments by name, given the counts of the global batch."""

    def losses(self, output: Tensor, batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """This micro-batch's share of each loss of the global batch, under the names of `counts`.

        The shares are added up, and what is minimised is the sum of the losses.
        """


class LanguageModelling:
    """Next-token cross entropy, averaged over the unmasked tokens of the global batch."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The number of unmasked tokens."""
        return {"lm loss": batch["loss_mask"].sum()}

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """Each token's weight is its mask over the global count, so the model's losses need only be added up."""
        passed: Batch = {name: batch[name] for name in ("positions", "documents", "labels") if name in batch}
        return {"inputs": batch["input_ids"], **passed, "loss_weights": batch["loss_mask"] / counts["lm loss"].clamp(min=1.0)}

    def losses(self, output: Tensor, batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """output: weighted losses [b, s]."""
        return {"lm loss": output.sum()}


class SpanCorruption(LanguageModelling):
    """T5's: next-token cross entropy of what the decoder is to spell, averaged over its unmasked tokens of the global batch."""

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """As LanguageModelling, for a model that is given two sequences. Padding ends the decoder's, which needs no mask for it."""
        passed = {name: batch[name] for name in ("decoder_input_ids", "padding_mask")}
        return super().inputs(batch, counts) | passed


class MaskedLanguageModelling:
    """BERT's: cross entropy of the masked tokens of the global batch, and where the data has it that of the order of two segments."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Masked tokens; samples, each counted where its first token is."""
        counts = {"lm loss": batch["loss_mask"].sum()}
        if "sentence_order" in batch:
            here = batch["coordinates"][0] == 0 if "coordinates" in batch else 1.0
            counts["sop loss"] = torch.ones_like(batch["sentence_order"], dtype=torch.float32).sum() * here
        return counts

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """Weights are masks, or ones, over the global counts, so the model's losses need only be added up."""
        passed: Batch = {name: batch[name] for name in ("token_types", "padding_mask", "labels", "sentence_order") if name in batch}
        weights = {"loss_weights": batch["loss_mask"] / counts["lm loss"].clamp(min=1.0)}
        if "sentence_order" in batch:
            weights["order_weights"] = (1.0 / counts["sop loss"]).expand(len(batch["input_ids"]))
        return {"inputs": batch["input_ids"], **passed, **weights}

    def losses(self, output: Tensor | tuple[Tensor, Tensor], batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """output: weighted losses of tokens [b, s], and of orders [b] where there are any."""
        parts = output if isinstance(output, tuple) else (output,)
        return {name: part.sum() for name, part in zip(counts, parts, strict=True)}


TASKS = Registry(
    "loss",
    {
        "lm": "megalith.training.tasks:LanguageModelling",
        "bert": "megalith.training.tasks:MaskedLanguageModelling",
        "t5": "megalith.training.tasks:SpanCorruption",
    },
)
