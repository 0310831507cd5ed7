"""The micro-batches of a global batch through the model: what every training step, validation and parity check runs.

Losses and metrics are added up over micro-batches and processes; nothing here waits for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megalith.common.errors import TrainingError, problem
from megalith.config.flags.text import Words
from megalith.runtime.build import Runtime
from megalith.training import pooled
from megalith.training.tasks import Batch, MetricSums, PooledTask, Task


@dataclasses.dataclass
class Sums:
    """Running sums on one process, float64: its parts of the losses, and the sums of each metric."""

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]

    def add(self, task: Task, losses: Mapping[str, Tensor], metrics: Mapping[str, MetricSums]) -> None:
        """Add those of a micro-batch. Raises TrainingError where a name is not declared, or a loss is missing."""
        rule = "must return the names of `counts` (what is not to be minimised is for `metrics`)"
        _check_names(task, "losses", losses, self.losses, rule, self.losses)
        _check_names(task, "metrics", metrics, self.metrics, "must return the names of `metric_names`")
        for name, part in losses.items():
            self.losses[name] += part.detach().double()
        for name, sums in metrics.items():
            for number, value in enumerate(sums):
                self.metrics[name][number] += value

    def flat(self) -> Tensor:
        """All of them, one after the other: a number for each loss, and the sums of each metric."""
        return torch.cat((torch.stack(list(self.losses.values())), *self.metrics.values()))


def _check_names(
    task: Task, what: str, found: Iterable[str], known: Iterable[str], rule: str, needed: Iterable[str] = ()
) -> None:  # fmt: skip
    wrong = [name for name in found if name not in known] + [f"no {name}" for name in needed if name not in found]
    if wrong:
        names = ", ".join(known)
        where, cure = f"{type(task).__name__}.{what}", f"Return exactly {names}" if names else "Return none"
        raise TrainingError(problem(where, Words(", ".join(wrong)), rule, cure))


def forward_backward(
    runtime: Runtime, task: Task, batches: Sequence[Batch], iteration: int, *, loss_scale: float = 1.0,
    extra: Sequence[float] = (),
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Losses, metrics and gradients of a global batch. Every process calls it.

    batches: this process's micro-batches, as `runtime.prepare_batch` gives them. iteration: keys the dropout masks.
    loss_scale: factor on the gradients. extra: numbers to be summed over all processes.
    Returns (counts, sums): what the losses were divided by, and float64 numbers that are equal on every process: a
    loss for each of `counts`, the sums of each of `task.metric_names`, then those of `extra`.
    """
    counts = global_counts(runtime, task, batches)
    runtime.begin_step(iteration)
    sums = run_micro_batches(runtime, task, batches, counts, iteration, train=True, loss_scale=loss_scale)
    reduced = runtime.mesh.all_reduce(torch.cat((sums, sums.new_tensor(extra))))
    runtime.finish_gradients()
    return counts, reduced


def run_micro_batches(
    runtime: Runtime, task: Task, batches: Sequence[Batch], counts: dict[str, Tensor], iteration: int, *, train: bool,
    loss_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Run micro-batches forward, and backward where `train`. Every process calls it.

    Returns this process's part of the sums that `forward_backward` describes, to be summed over all processes. It is
    zero on processes without the end of the model, and where another tensor-parallel process has the same.
    """
    device = runtime.mesh.device
    if both := [name for name in task.metric_names if name in counts]:
        rule = "must not name a loss, as the two could not be told apart"
        raise TrainingError(
            problem(f"{type(task).__name__}.metric_names", Words(", ".join(both)), rule, "Rename the metric")
        )
    sizes = task.metric_sizes
    sums = Sums(
        {name: torch.zeros((), dtype=torch.float64, device=device) for name in counts},
        {name: torch.zeros(sizes.get(name, 2), dtype=torch.float64, device=device) for name in task.metric_names},
    )

    def loss(output: Any, batch: Batch) -> Tensor:
        losses = task.losses(output, batch, counts)
        with torch.no_grad():
            sums.add(task, losses, task.metrics(output, batch))
        value = torch.stack(list(losses.values())).sum()
        return value * loss_scale if loss_scale != 1.0 else value

    step = torch.tensor(iteration, device=device)
    inputs = [model_arguments(task, batch, counts) | {"step": step} for batch in batches]
    counted_here = runtime.mesh.rank("tp") == 0
    if isinstance(task, PooledTask):
        pooled.run(runtime, task, batches, inputs, loss, iteration, train)
        counted_here = counted_here and runtime.mesh.data_rank == 0 and runtime.mesh.rank("cp") == 0
    else:
        runtime.run(inputs, lambda output, number: loss(output, batches[number]), train)
    flat = sums.flat()
    return flat if counted_here else torch.zeros_like(flat)  # not times 0, which makes an infinite loss nan


def model_arguments(task: Task, batch: Batch, counts: dict[str, Tensor]) -> Batch:
    """The model's arguments for a micro-batch, except the step: the task's, and the positions of samples and tokens."""
    positions = {name: batch[name] for name in ("samples", *task.sequences.values()) if name in batch}
    return task.inputs(batch, counts) | positions


def global_counts(runtime: Runtime, task: Task, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """What each loss is divided by: the sum over the micro-batches of all processes."""
    all_counts = [task.counts(batch) for batch in batches]
    names = all_counts[0]
    for counts in all_counts[1:]:
        _check_names(task, "counts", counts, names, "must return the same names for every micro-batch", names)
    sums = [torch.stack([counts[name] for counts in all_counts]).sum().double() for name in names]
    total = torch.stack(sums).to(runtime.mesh.device)
    return dict(zip(names, runtime.mesh.sum_over_data(total).float(), strict=True))
