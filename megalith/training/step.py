"""One training step: micro-batches, one reduction, clipping, the optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from megalith.optim.clip import clip, count_zeros
from megalith.optim.groups import set_rates
from megalith.optim.loss_scale import StaticLossScale
from megalith.optim.schedule import Schedule
from megalith.runtime.build import Runtime
from megalith.training.state import REASONS, Progress
from megalith.training.tasks import Batch, Task


@dataclasses.dataclass
class Trainer:
    """What a step works with."""

    runtime: Runtime
    task: Task
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loss_scale: StaticLossScale

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.runtime.mesh.device


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Numbers of one step, equal on every process."""

    losses: dict[str, float]
    grad_norm: float
    learning_rate: float
    weight_decay: float
    loss_scale: float
    tokens: int
    updated: bool
    stop: str | None  # why any process asks that the run end, one of REASONS
    lasting: bool  # not finite, and no smaller loss scale can help
    uncounted: tuple[str, ...]  # losses that no token of the global batch counts for; their value is nan
    zeros: int | None  # gradient elements that are zero, where asked for


def train_step(trainer: Trainer, batches: list[Batch], progress: Progress, stop: str | None = None) -> StepResult:
    """Run one step on this process's micro-batches.

    stop: why this process asks that the run end; the answer is shared, so that all end at the same step.
    A step whose loss or gradients are not finite changes no weights. All ranks judge by the same sums, so they judge alike.
    """
    runtime, mesh = trainer.runtime, trainer.runtime.mesh
    batches = [runtime.take(batch) for batch in batches]
    counts = global_counts(trainer, batches)
    step = torch.tensor(progress.iteration, device=trainer.device)
    runtime.begin_step(progress.iteration)
    scale = trainer.loss_scale.scale
    totals = run(trainer, batches, counts, step, train=True)
    shared = mesh.share(torch.cat((totals, totals.new_tensor(asking(stop)))))
    runtime.finish_gradients()
    named, copies = runtime.gradients()
    over = {"skip": copies, "stages": mesh.size("pp")}
    norm = clip(named, runtime.config.optimizer.clip_grad, inverse_scale=trainer.loss_scale.inverse, **over)
    zeros = int(count_zeros(named, **over)) if runtime.config.logging.log_num_zeros_in_grad else None
    numbers = torch.cat((torch.stack(list(counts.values())).double(), shared, norm.double().view(1)))
    *numbers, grad_norm = numbers.tolist()  # the step's one wait for the device
    counted, losses, stops = numbers[: len(counts)], numbers[len(counts) : -len(REASONS)], numbers[-len(REASONS) :]
    finite = all(map(math.isfinite, losses))
    updated = finite and math.isfinite(grad_norm)
    # A smaller scale mends gradients of float16 that overflow, never a loss, which is not scaled.
    lasting = not updated and (trainer.loss_scale.lowest or not finite)
    uncounted = tuple(name for name, count in zip(counts, counted) if count == 0.0)
    rates = trainer.schedule.lr(progress.scheduled_samples), trainer.schedule.weight_decay(progress.scheduled_samples)
    if updated:
        set_rates(trainer.optimizer, *rates)
        trainer.optimizer.step()
    trainer.loss_scale.update(not updated)
    trainer.optimizer.zero_grad(set_to_none=True)
    tokens = sum(batch["input_ids"].numel() for batch in batches) * mesh.data_size * mesh.size("cp")
    means = dict(zip(counts, losses, strict=True)) | dict.fromkeys(uncounted, math.nan)
    return StepResult(means, grad_norm, *rates, scale, tokens, updated, asked(stops), lasting, uncounted, zeros)


def asking(reason: str | None) -> list[float]:
    """One number per reason to end the run, to be summed over all processes."""
    return [float(reason == each) for each in REASONS]


def asked(sums: Iterable[float]) -> str | None:
    """The first reason that any process gave, of sums of `asking`."""
    return next((reason for reason, count in zip(REASONS, sums) if count), None)


def run(trainer: Trainer, batches: list[Batch], counts: dict[str, Tensor], step: Tensor, train: bool) -> Tensor:
    """Run micro-batches forward, and backward where `train`. Every process calls it.

    Returns this process's part of the losses, float64 in the order of `counts`; the sum over all processes is whole. It is zero
    where the end of the model is not, and where another tensor-parallel process has the same.
    """
    mesh, scale = trainer.runtime.mesh, trainer.loss_scale.scale if train else 1.0
    totals = {name: torch.zeros((), dtype=torch.float64, device=trainer.device) for name in counts}

    def loss(output: Tensor, number: int) -> Tensor:
        losses = trainer.task.losses(output, batches[number], counts)
        for name, share in losses.items():
            totals[name] += share.detach().double()
        value = torch.stack(list(losses.values())).sum()
        return value * scale if scale != 1.0 else value

    places = [{name: batch[name] for name in ("samples", "coordinates", "decoder_coordinates") if name in batch} for batch in batches]
    inputs = [trainer.task.inputs(batch, counts) | place | {"step": step} for batch, place in zip(batches, places)]
    trainer.runtime.run(inputs, loss, train)
    whole = torch.stack(list(totals.values()))
    return whole if mesh.place("tp") == 0 else torch.zeros_like(whole)  # not times 0, which makes an infinite loss nan


def global_counts(trainer: Trainer, batches: list[Batch]) -> dict[str, Tensor]:
    """What each loss is divided by: the sum over the micro-batches of all processes."""
    each = [trainer.task.counts(batch) for batch in batches]
    total = torch.stack([torch.stack([counts[name] for counts in each]).sum().double() for name in each[0]])
    return dict(zip(each[0], trainer.runtime.mesh.sum(total).float(), strict=True))
