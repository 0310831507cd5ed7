"""Tasks: what is learned from a batch. A task is a few small methods; a user's own is named as `module:name`.

A loss is a sum over the whole global batch divided by a count over the whole global batch, so the count must be known
before the first backward pass: `counts` is called for every micro-batch, and what it returns is summed over all
processes.
"""

from __future__ import annotations

import abc
import itertools
import math
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

# One micro-batch: b samples of s tokens (with context parallelism, this process's part of the tokens).
Batch = dict[str, Tensor]
# Of a metric of one micro-batch: a sum and what it is divided by, or more (see Task.metric_sizes).
MetricSums = Sequence[Tensor | float]


class Task(abc.ABC):
    """A loss, or several, by name, and what is reported beside them. One object lasts for the whole run.

    metric_names: what `metrics` returns, the same in every batch and on every process.
    metric_sizes: {name: number of sums} of the metrics that are not a ratio of two.
    best_metric: the metric whose highest value on validation data marks the best checkpoint; None: the lowest loss.
    sequences: {array of ids [b, s] in a batch: name of the positions of its tokens}; the model is given these positions
        with context parallelism (parallel/context.py).
    """

    metric_names: Sequence[str] = ()
    metric_sizes: Mapping[str, int] = MappingProxyType({})
    best_metric: str | None = None
    sequences: Mapping[str, str] = MappingProxyType(
        {"input_ids": "coordinates", "decoder_input_ids": "decoder_coordinates"}
    )  # fmt: skip

    def setup(  # noqa: B027 - need not be overridden
        self, config: RunConfig, mesh: Mesh, tokenizer: Tokenizer | None
    ) -> None:
        """Called once, before all other methods. tokenizer: None where batches are random (megalith parity)."""

    def tokens(self, batch: Batch) -> int:
        """Tokens of this micro-batch on this process, for the speed of a run: those of the first of `sequences`."""
        found = [batch[name] for name in self.sequences if name in batch]
        if not found:
            what = f"A batch of {type(self).__name__}"
            rule = f"must have one of its `sequences`, {', '.join(self.sequences)}"
            cure = "Name those of the dataset, or override `tokens`"
            raise TrainingError(problem(what, Words(", ".join(batch)), rule, cure))
        return found[0].numel()

    @abc.abstractmethod
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What each loss of this micro-batch is to be divided by, before division: {name: number of tokens, say}."""

    @abc.abstractmethod
    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """The model's arguments by name, given the counts of the global batch."""

    @abc.abstractmethod
    def losses(self, output: Any, batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """This micro-batch's part of each loss of the global batch, under the names of `counts`.

        output: what the model returned. The parts are added up, and what is minimised is the sum of the losses.
        """

    def metrics(self, output: Any, batch: Batch) -> dict[str, MetricSums]:
        """What is reported and never minimised: {name: (sum, count)} of this micro-batch, without gradient.

        Where metric_sizes has the name, there are as many sums as it says, of which `metric` makes the number.

        Sums and counts are added up over the global batch: over micro-batches, data- and context-parallel processes,
        and once where tensor-parallel processes have the same. With context parallelism each process returns what its
        tokens add. What belongs to a whole sample is returned by one of them, and (0, 0) by the others: `coordinates`
        [s] say which tokens a process has.
        """
        return {}

    def metric(self, name: str, sums: Sequence[float]) -> float:
        """A metric, of its sums over the global batch; not a number where nothing was counted."""
        total, count = sums
        return total / count if count else math.nan

    def metrics_of(self, numbers: Sequence[float]) -> dict[str, float]:
        """All metrics by name, of the sums of each, one after the other."""
        rest = iter(numbers)
        sums = {name: list(itertools.islice(rest, self.metric_sizes.get(name, 2))) for name in self.metric_names}
        return {name: self.metric(name, each) for name, each in sums.items()}

    def predictions(self, output: Any, batch: Batch) -> Tensor | None:
        """What the model predicts of each sample, float [b, n], for the file of predictions; None where there is none.

        With context parallelism it is asked of the process that has the samples' first tokens.
        """
        return None


class PooledTask(Task):
    """A task whose losses are a function of what the model returned for the whole global batch (in-batch negatives).

    The step runs every micro-batch forward without gradient, gathers what `pooled` returns for the outputs, computes
    the losses and their gradient by each of these, and runs every micro-batch again, forward and backward, with that
    gradient (GradCache: Gao et al., 2021, arXiv 2101.06983). The gradient is exact, and no layout or micro-batch size
    changes it. Cost: one forward pass more, a third of a step's FLOPs; and on every process that has the end of the
    model, the memory of what `pooled` returns for all samples, and the losses of all of them.
    """

    @abc.abstractmethod
    def pooled(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """What the losses need of this micro-batch, {name: [b, ...]}, from the model's output.

        With context parallelism floating-point tensors are added up over the processes of a sequence: each returns what
        its tokens add, or zeros. Other tensors (labels) must be the same on all of them, and have no gradient.
        """

    @abc.abstractmethod
    def losses(self, output: dict[str, Tensor], batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each complete loss of the global batch, under the names of `counts`.

        output: what `pooled` returned, of all samples in their order, in float32 at least. batch: empty. `metrics` gets
        the same arguments.
        """


class LanguageModelling(Task):
    """Next-token cross entropy, averaged over the unmasked tokens of the global batch."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The number of unmasked tokens."""
        return {"lm loss": batch["loss_mask"].sum()}

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """Each token's weight is its mask / global count, so that the model's losses need only be added up."""
        names = ("positions", "documents", "padding_mask", "labels", "neighbor_tokens", "neighbor_mask")
        passed: Batch = {name: batch[name] for name in names if name in batch}
        return {
            "inputs": batch["input_ids"],
            **passed,
            "loss_weights": batch["loss_mask"] / divisor(counts["lm loss"]),
        }

    def losses(self, output: Tensor, batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """output: weighted losses [b, s]."""
        return {"lm loss": output.sum()}


class SpanCorruption(LanguageModelling):
    """T5's task: next-token cross entropy of the decoder's target, averaged over its unmasked tokens."""

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """As LanguageModelling, for two sequences.

        The decoder's is padded at its end, so that it needs no mask, and that of a dataset is not passed. Where it is
        padded elsewhere, the batch has `decoder_key_padding_mask` [b, t], which hides keys of its self-attention.
        """
        passed = {"decoder_input_ids": batch["decoder_input_ids"]}
        if "decoder_key_padding_mask" in batch:
            passed["decoder_padding_mask"] = batch["decoder_key_padding_mask"]
        return super().inputs(batch, counts) | passed


class MaskedLanguageModelling(Task):
    """BERT's task: cross entropy of the masked tokens of the global batch, and of the order of two segments.

    The second loss is there where the data has `sentence_order`: of all samples, or where `order_mask` [b] is 1.
    """

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Masked tokens; samples, each counted on the process that has its first token."""
        counts = {"lm loss": batch["loss_mask"].sum()}
        if "sentence_order" in batch:
            here = batch["coordinates"][0] == 0 if "coordinates" in batch else 1.0
            counts["sop loss"] = sample_mask(batch, "order_mask").sum() * here
        return counts

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """Weights are masks, or ones, / global counts, so that the model's losses need only be added up."""
        names = ("positions", "token_types", "padding_mask", "labels", "sentence_order")
        passed: Batch = {name: batch[name] for name in names if name in batch}
        weights = {"loss_weights": batch["loss_mask"] / counts["lm loss"].clamp(min=1.0)}
        if "sentence_order" in batch:
            weights["order_weights"] = sample_mask(batch, "order_mask") / counts["sop loss"].clamp(min=1.0)
        return {"inputs": batch["input_ids"], **passed, **weights}

    def losses(
        self, output: Tensor | tuple[Tensor, Tensor], batch: Batch, counts: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """output: weighted losses of tokens [b, s], and of orders [b] where there are any."""
        parts = output if isinstance(output, tuple) else (output,)
        return {name: part.sum() for name, part in zip(counts, parts, strict=True)}


def divisor(count: Tensor) -> Tensor:
    """A count; 1 where nothing is counted. Weights of samples may add up to less than 1."""
    return torch.where(count > 0, count, torch.ones_like(count))


def sample_mask(batch: Batch, name: str) -> Tensor:
    """float32 [b]: the mask of samples that a batch has under this name, ones where it has none."""
    ids = batch["input_ids"]
    return batch[name] if name in batch else torch.ones(len(ids), dtype=torch.float32, device=ids.device)


TASKS = Registry(
    "loss",
    {
        "lm": "megalith.training.tasks:LanguageModelling",
        "bert": "megalith.training.tasks:MaskedLanguageModelling",
        "t5": "megalith.training.tasks:SpanCorruption",
        "classification": "megalith.training.tasks_classification:Classification",
        "regression": "megalith.training.tasks_classification:Regression",
        "ict": "megalith.training.tasks_retrieval:InverseCloze",
        "nq": "megalith.training.tasks_retrieval:PassageRetrieval",
    },
)


def build_task(config: RunConfig, mesh: Mesh, tokenizer: Tokenizer | None = None) -> Task:
    """The task that --loss names, set up. A class with `counts`, `inputs` and `losses` alone gets the rest from Task.

    Raises ConfigError where it is not a class, or one of these is missing.
    """
    found = TASKS.find(config.data.loss)
    rule, cure = "must be a class", "megalith/training/tasks.py has some to begin with"
    if not isinstance(found, type):
        raise ConfigError(problem(f"--loss {config.data.loss}", Words(f"a {type(found).__name__}"), rule, cure))
    kind = found if issubclass(found, Task) else type(found.__name__, (found, Task), {})
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        needed = Words(f"a class without {' and '.join(missing)}")
        rule = "must have the methods counts, inputs and losses, and pooled where it is a PooledTask"
        raise ConfigError(problem(f"--loss {config.data.loss}", needed, rule, cure))
    task = kind()
    task.setup(config, mesh, tokenizer)
    return task
