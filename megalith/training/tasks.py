"""What is learned from a batch. A task is three small functions; a user's own goes by `module:name`.

A loss is a sum over the whole global batch divided by a count over the whole global batch, so the count must be known
before the first backward pass: `counts` is asked for every micro-batch, and what comes back is summed over all processes.
"""

from __future__ import annotations

from typing import Protocol

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


TASKS = Registry("loss", {"lm": "megalith.training.tasks:LanguageModelling"})
