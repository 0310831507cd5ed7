"""What is learned from a batch. A task is a few small functions; a user's own goes by `module:name`.

A loss is a sum over the whole global batch divided by a count over the whole global batch, so the count must be known
before the first backward pass: `counts` is asked for every micro-batch, and what comes back is summed over all processes.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megalith.common.errors import ConfigError, TrainingError, problem
from megalith.common.registry import Registry
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.runtime.build import Mesh

Batch = dict[
    str, Tensor
]  # of one micro-batch; b samples of s tokens (with context parallelism, this process's part of them)
Ratio = tuple[Tensor | float, Tensor | float]  # a sum and what it is divided by, both of one micro-batch


class Task(abc.ABC):
    """A loss, or several, by name, and what is reported beside them. One object lasts for the whole run.

    metric_names: what `metrics` returns, the same in every batch and on every process.
    sequences: the arrays of ids [b, s] in a batch -> what the places of their tokens are called, which the model is given
        with context parallelism (parallel/context.py).
    """

    metric_names: Sequence[str] = ()
    sequences: Mapping[str, str] = MappingProxyType(
        {"input_ids": "coordinates", "decoder_input_ids": "decoder_coordinates"}
    )  # fmt: skip

    def setup(self, config: RunConfig, mesh: Mesh, tokenizer: Tokenizer | None) -> None:  # noqa: B027 - need not be overridden
        """Called once, before anything else. tokenizer: None where batches are made up (megalith parity)."""

    def tokens(self, batch: Batch) -> int:
        """Tokens of this micro-batch on this process, by which speed is told: those of the first of `sequences`."""
        found = [batch[name] for name in self.sequences if name in batch]
        if not found:
            rule = f"a batch has one of its sequences, {', '.join(self.sequences)}"
            cure = "Name those of the dataset, or override `tokens`"
            raise TrainingError(problem(type(self).__name__, Words(f"a batch of {', '.join(batch)}"), rule, cure))
        return found[0].numel()

    @abc.abstractmethod
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What each loss of this micro-batch is to be divided by, before division: {name: number of tokens, say}."""

    @abc.abstractmethod
    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """The model's arguments by name, given the counts of the global batch."""

    @abc.abstractmethod
    def losses(self, output: Any, batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """This micro-batch's share of each loss of the global batch, under the names of `counts`.

        output: what the model returned. The shares are added up, and what is minimised is the sum of the losses.
        """

    def metrics(self, output: Any, batch: Batch) -> dict[str, Ratio]:
        """What is reported and never minimised: {name: (sum, count)} of this micro-batch, without gradient.

        Sums and counts are added up over the global batch: over micro-batches, data- and context-parallel processes, and
        once where tensor-parallel processes have the same. With context parallelism each process gives what its own tokens
        add, so what is of a whole sample is given by one of them, (0, 0) by the others; `coordinates` [s] tell them apart.
        """
        return {}


class PooledTask(Task):
    """A task whose losses are a function of what the model returned for the whole global batch (in-batch negatives).

    The step runs every micro-batch forward without gradient, gathers what `pooled` makes of the outputs, computes the losses
    and their gradient by each of them, and runs every micro-batch again, forward and backward, with that gradient
    (GradCache: Gao et al., 2021, arXiv 2101.06983). The gradient is exact, and no layout or micro-batch size changes it.
    Cost: one forward pass more, a third of a step's FLOPs; what `pooled` keeps of all samples, and the losses of all of
    them, on every process that has the end of the model.
    """

    @abc.abstractmethod
    def pooled(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """What the losses need of this micro-batch, {name: [b, ...]}, from the model's output.

        With context parallelism floating-point tensors are added up over the processes of a sequence: each gives what its
        own tokens add, or zeros. Other tensors (labels) must be the same on all of them, and have no gradient.
        """

    @abc.abstractmethod
    def losses(self, output: dict[str, Tensor], batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each loss of the global batch, whole, under the names of `counts`.

        output: what `pooled` gave, of all samples in their order, in float32 at least. batch: empty. `metrics` is given the same.
        """


class LanguageModelling(Task):
    """Next-token cross entropy, averaged over the unmasked tokens of the global batch."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The number of unmasked tokens."""
        return {"lm loss": batch["loss_mask"].sum()}

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """Each token's weight is its mask over the global count, so the model's losses need only be added up."""
        passed: Batch = {name: batch[name] for name in ("positions", "documents", "labels") if name in batch}
        return {
            "inputs": batch["input_ids"],
            **passed,
            "loss_weights": batch["loss_mask"] / counts["lm loss"].clamp(min=1.0),
        }

    def losses(self, output: Tensor, batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """output: weighted losses [b, s]."""
        return {"lm loss": output.sum()}


class SpanCorruption(LanguageModelling):
    """T5's: next-token cross entropy of what the decoder is to spell, averaged over its unmasked tokens of the global batch."""

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """As LanguageModelling, for a model that is given two sequences. Padding ends the decoder's, which needs no mask for it."""
        passed = {name: batch[name] for name in ("decoder_input_ids", "padding_mask")}
        return super().inputs(batch, counts) | passed


class MaskedLanguageModelling(Task):
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
        passed: Batch = {
            name: batch[name] for name in ("token_types", "padding_mask", "labels", "sentence_order") if name in batch
        }
        weights = {"loss_weights": batch["loss_mask"] / counts["lm loss"].clamp(min=1.0)}
        if "sentence_order" in batch:
            weights["order_weights"] = (1.0 / counts["sop loss"]).expand(len(batch["input_ids"]))
        return {"inputs": batch["input_ids"], **passed, **weights}

    def losses(
        self, output: Tensor | tuple[Tensor, Tensor], batch: Batch, counts: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """output: weighted losses of tokens [b, s], and of orders [b] where there are any."""
        parts = output if isinstance(output, tuple) else (output,)
        return {name: part.sum() for name, part in zip(counts, parts, strict=True)}


TASKS = Registry(
    "loss",
    {
        "lm": "megalith.training.tasks:LanguageModelling",
        "bert": "megalith.training.tasks:MaskedLanguageModelling",
        "t5": "megalith.training.tasks:SpanCorruption",
        "classification": "megalith.training.tasks_classification:Classification",
    },
)


def build_task(config: RunConfig, mesh: Mesh, tokenizer: Tokenizer | None = None) -> Task:
    """The task that --loss names, set up. A class with `counts`, `inputs` and `losses` alone gets the rest from Task.

    Raises ConfigError where it is no class, or one of these is missing.
    """
    found = TASKS.find(config.data.loss)
    rule, cure = "it is a class", "megalith/training/tasks.py has some to begin with"
    if not isinstance(found, type):
        raise ConfigError(problem(f"--loss {config.data.loss}", Words(f"a {type(found).__name__}"), rule, cure))
    kind = found if issubclass(found, Task) else type(found.__name__, (found, Task), {})
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        needed = Words(f"a class without {' and '.join(missing)}")
        rule = "a task has the methods counts, inputs and losses, and pooled where it is a PooledTask"
        raise ConfigError(problem(f"--loss {config.data.loss}", needed, rule, cure))
    task = kind()
    task.setup(config, mesh, tokenizer)
    return task
