"""The micro-batches of a global batch through the model: what every step, validation and check runs.

Losses and metrics are added up over micro-batches and processes; nothing here waits for the device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megalith.common.errors import TrainingError, problem
from megalith.config.flags.text import Words
from megalith.runtime.build import Runtime
from megalith.training import pooled
from megalith.training.tasks import Batch, PooledTask, Ratio, Task


@dataclasses.dataclass
class Sums:
    """Running sums on one process, float64: its shares of losses, and of metrics the sum and the count."""

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]

    def add(self, task: Task, losses: Mapping[str, Tensor], metrics: Mapping[str, Ratio]) -> None:
        """Add those of a micro-batch. Raises TrainingError where a name is not declared, or a loss is missing."""
        rule = "those of `counts`; what is not to be minimised is for `metrics`"
        _check_names(task, "losses", losses, self.losses, rule, self.losses)
        _check_names(task, "metrics", metrics, self.metrics, "those of `metric_names`")
        for name, share in losses.items():
            self.losses[name] += share.detach().double()
        for name, (total, count) in metrics.items():
            self.metrics[name][0] += total
            self.metrics[name][1] += count

    def flat(self) -> Tensor:
        """All of them, one after the other: a number for each loss, two for each metric."""
        return torch.cat((torch.stack(list(self.losses.values())), *self.metrics.values()))


def _check_names(
    task: Task, what: str, found: Iterable[str], known: Iterable[str], rule: str, needed: Iterable[str] = ()
) -> None:  # fmt: skip
    wrong = [name for name in found if name not in known] + [f"no {name}" for name in needed if name not in found]
    if wrong:
        where, cure = f"{type(task).__name__}.{what}", f"Known are {', '.join(known) or 'none'}"
        raise TrainingError(problem(where, Words(", ".join(wrong)), f"its names are {rule}", cure))


def forward_backward(
    runtime: Runtime, task: Task, batches: Sequence[Batch], iteration: int, *, loss_scale: float = 1.0,
    also: Sequence[float] = (),
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Losses, metrics and gradients of a global batch. Every process calls it.

    batches: this process's micro-batches, as `runtime.take` gives them. iteration: keys the dropout masks.
    loss_scale: factor on the gradients. also: numbers to be summed over all processes.
    Returns (counts, sums): what the losses were divided by, and float64 numbers that are equal on every process: a
    loss for each of `counts`, a sum and a count for each of `task.metric_names`, then those of `also`.
    """
    counts = global_counts(runtime, task, batches)
    runtime.begin_step(iteration)
    sums = run(runtime, task, batches, counts, iteration, train=True, loss_scale=loss_scale)
    shared = runtime.mesh.share(torch.cat((sums, sums.new_tensor(also))))
    runtime.finish_gradients()
    return counts, shared


def run(
    runtime: Runtime, task: Task, batches: Sequence[Batch], counts: dict[str, Tensor], iteration: int, *, train: bool,
    loss_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Run micro-batches forward, and backward where `train`. Every process calls it.

    Returns this process's part of the sums that `forward_backward` describes; the sum over all processes is whole. It
    is zero where the end of the model is not, and where another tensor-parallel process has the same.
    """
    device = runtime.mesh.device
    if both := [name for name in task.metric_names if name in counts]:
        rule = "a metric and a loss of one name could not be told apart"
        raise TrainingError(
            problem(f"{type(task).__name__}.metric_names", Words(", ".join(both)), rule, "Rename the metric")
        )
    sums = Sums(
        {name: torch.zeros((), dtype=torch.float64, device=device) for name in counts},
        {name: torch.zeros(2, dtype=torch.float64, device=device) for name in task.metric_names},
    )

    def loss(output: Any, batch: Batch) -> Tensor:
        losses = task.losses(output, batch, counts)
        with torch.no_grad():
            sums.add(task, losses, task.metrics(output, batch))
        value = torch.stack(list(losses.values())).sum()
        return value * loss_scale if loss_scale != 1.0 else value

    step = torch.tensor(iteration, device=device)
    inputs = [arguments(task, batch, counts) | {"step": step} for batch in batches]
    once = runtime.mesh.place("tp") == 0
    if isinstance(task, PooledTask):
        pooled.run(runtime, task, batches, inputs, loss, iteration, train)
        once = once and runtime.mesh.data_rank == 0 and runtime.mesh.place("cp") == 0
    else:
        runtime.run(inputs, lambda output, number: loss(output, batches[number]), train)
    whole = sums.flat()
    return whole if once else torch.zeros_like(whole)  # not times 0, which makes an infinite loss nan


def arguments(task: Task, batch: Batch, counts: dict[str, Tensor]) -> Batch:
    """The model's arguments for a micro-batch but the step: the task's, and the places of samples and tokens."""
    places = {name: batch[name] for name in ("samples", *task.sequences.values()) if name in batch}
    return task.inputs(batch, counts) | places


def global_counts(runtime: Runtime, task: Task, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """What each loss is divided by: the sum over the micro-batches of all processes."""
    each = [task.counts(batch) for batch in batches]
    for counts in each[1:]:
        _check_names(task, "counts", counts, each[0], "the same for every micro-batch", each[0])
    sums = [torch.stack([counts[name] for counts in each]).sum().double() for name in each[0]]
    total = torch.stack(sums).to(runtime.mesh.device)
    return dict(zip(each[0], runtime.mesh.sum(total).float(), strict=True))


def ratios(names: Sequence[str], numbers: Sequence[float]) -> dict[str, float]:
    """Metrics by name, of a sum and a count for each; not a number where nothing was counted."""
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return {name: total / count if count else math.nan for name, (total, count) in zip(names, pairs, strict=True)}
