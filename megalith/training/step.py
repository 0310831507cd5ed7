"""One training step: micro-batches, one reduction, clipping, the optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from megalith.optim.clip import clip, count_zeros
from megalith.optim.groups import set_rates
from megalith.optim.loss_scale import StaticLossScale
from megalith.optim.schedule import Schedule
from megalith.runtime.build import Runtime
from megalith.training.forward_backward import forward_backward
from megalith.training.resume.state import STOP_REASONS, Progress
from megalith.training.tasks import Batch, Task


@dataclasses.dataclass
class Trainer:
    """What a training step needs."""

    runtime: Runtime
    task: Task
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loss_scale: StaticLossScale
    base: Mapping[str, str] | None = None  # with LoRA, what a checkpoint says of the weights that are not trained
    started: bool = False  # whether the model was built from the weights that a run starts from (resume/start.py)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.runtime.mesh.device


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """One step, in Python numbers that are equal on every process."""

    losses: dict[str, float]  # mean per name over the global batch; "lm loss" is Megatron's name of a language model's
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # the same of what is not minimised
    learning_rate: float
    weight_decay: float
    tokens: int  # of the global batch
    grad_norm: float | None = None  # before clipping
    loss_scale: float = 1.0
    skipped: bool = False  # loss or gradients were infinite or not a number, the weights did not change
    scale_cannot_help: bool = False  # skipped, and no smaller loss scale can help
    empty_losses: tuple[str, ...] = ()  # losses that no token of the batch counts for (all masked); their value is nan
    zeros: int | None = None  # gradient elements that are exactly zero, where asked for
    stop: str | None = None  # why any process asks that the run end, one of STOP_REASONS

    @property
    def total_loss(self) -> float:
        """What is minimised: the sum of the losses."""
        return sum(self.losses.values())

    @property
    def nan(self) -> bool:
        """Whether a loss was infinite or not a number."""
        return not all(map(math.isfinite, self.losses.values()))


def train_step(
    trainer: Trainer, batches: Sequence[Batch], progress: Progress, stop: str | None = None,
    before_optimizer_step: Callable[[], None] = lambda: None,
) -> StepResult:  # fmt: skip
    """Run one step on this process's micro-batches.

    stop: why this process asks that the run end; reduced over all processes, so that all end at the same step.
    before_optimizer_step: called when the gradients are complete and clipped, in a step that changes weights.
    A step whose loss or gradients are not finite changes no weights. All ranks decide by the same sums, and so alike.
    """
    runtime, mesh, task = trainer.runtime, trainer.runtime.mesh, trainer.task
    batches = [runtime.prepare_batch(batch, task.sequences) for batch in batches]
    scale = trainer.loss_scale.scale
    extra = encode_stop(stop)
    counts, sums = forward_backward(runtime, task, batches, progress.iteration, loss_scale=scale, extra=extra)
    gradients, not_owned = runtime.gradients()
    counting = {"not_owned": not_owned, "stages": mesh.size("pp")}
    norm = clip(gradients, runtime.config.optimizer.clip_grad, inverse_scale=trainer.loss_scale.inverse, **counting)
    zeros = int(count_zeros(gradients, **counting)) if runtime.config.logging.log_num_zeros_in_grad else None
    numbers = torch.cat((torch.stack(list(counts.values())).double(), sums, norm.double().view(1)))
    *numbers, grad_norm = numbers.tolist()  # the step's one wait for the device
    last, stop_at = 2 * len(counts), -len(STOP_REASONS)
    counted, losses, stops = numbers[: len(counts)], numbers[len(counts) : last], numbers[stop_at:]
    metrics = task.metrics_of(numbers[last:stop_at])
    finite = all(map(math.isfinite, losses))
    updated = finite and math.isfinite(grad_norm)
    # A smaller scale helps where gradients of float16 overflow, but never where the loss does, which is not scaled.
    scale_cannot_help = not updated and (trainer.loss_scale.at_minimum or not finite)
    empty_losses = tuple(name for name, count in zip(counts, counted) if count == 0.0)
    done, schedule = progress.scheduled_samples, trainer.schedule
    lr, decay = schedule.lr(done), schedule.weight_decay(done)
    if updated:
        set_rates(trainer.optimizer, lr, decay)
        before_optimizer_step()
        trainer.optimizer.step()
    trainer.loss_scale.update(not updated)
    trainer.optimizer.zero_grad(set_to_none=True)
    return StepResult(
        losses=dict(zip(counts, losses, strict=True)) | dict.fromkeys(empty_losses, math.nan), metrics=metrics,
        learning_rate=lr, weight_decay=decay, loss_scale=scale, grad_norm=grad_norm, zeros=zeros,
        tokens=sum(map(task.tokens, batches)) * mesh.data_size * mesh.size("cp"),
        skipped=not updated, scale_cannot_help=scale_cannot_help, empty_losses=empty_losses, stop=decode_stop(stops),
    )  # fmt: skip


def encode_stop(reason: str | None) -> list[float]:
    """One number per reason to end the run, to be summed over all processes."""
    return [float(reason == each) for each in STOP_REASONS]


def decode_stop(sums: Iterable[float]) -> str | None:
    """The first reason that any process gave, from sums of `encode_stop`."""
    return next((reason for reason, count in zip(STOP_REASONS, sums) if count), None)
