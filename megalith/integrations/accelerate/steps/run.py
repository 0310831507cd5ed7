"""A call of the model with a train step of the user's own: micro-batches through its forward step and loss function.

The loss is Megatron's: the mean over micro-batches and data-parallel processes of what the loss function returns; with
a number of tokens returned beside it, the sum over all tokens of the call, divided by their number. As in calls.py the
passes of a single micro-batch without a pipeline make an autograd graph, and others are run within the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import TrainingError, problem
from megalith.config.flags.text import Words
from megalith.config.stages import LOOPING, schedule_of
from megalith.integrations.accelerate.batches import IndexedBatch
from megalith.integrations.accelerate.gradients import (
    DetachedLogits,
    LocalLoss,
    put_gradients,
    run_one_after_the_other,
    scheduled_loss,
    take_gradients,
)
from megalith.integrations.accelerate.session import Session
from megalith.integrations.accelerate.steps.arguments import step_arguments
from megalith.integrations.accelerate.steps.megatron_models import (
    PipelineOutput,
    RecordingModel,
    StepModel,
    with_megatron_names,
)
from megalith.integrations.accelerate.steps.train_steps import AbstractTrainStep, build_train_step
from megalith.parallel.sharding import to_local

RULE = "must return (loss, {name: value}), or (sum of losses, number of tokens, {name: value})"
CURE = "Return a 0-dimensional loss, computed from the model's output, and what is to be reported"

MicroBatch = tuple[dict[str, Tensor], Tensor]  # transformers' or an indexed dataset's names, numbers of its samples


class Forward(NamedTuple):
    """What a forward step did with a micro-batch: the model it was given; the output and a function of it."""

    model: StepModel
    output: Any
    loss_func: Callable


class Returned(NamedTuple):
    """What the loss function returned for a micro-batch.

    share: of the loss of the call, without gradient. tokens: None where it gave none.
    """

    share: Tensor
    tokens: Tensor | None
    reported: dict[str, Any]


class StepRun:
    """The micro-batches of one call, and what the loss function has returned for them so far."""

    def __init__(self, session: Session, step: AbstractTrainStep, training: bool, number: int):
        """training: the model's mode. number: of micro-batches."""
        self.session, self.step, self.training = session, step, training
        self.trains = torch.is_grad_enabled() and session.trains
        self.shares = number * session.runtime.mesh.data_size
        self.tokens_of_sample = session.config.data.seq_length or 1  # keeps sums of losses within float16
        self.returned: list[Returned] = []

    def forward(self, model_class: type[StepModel], batch: MicroBatch) -> Forward:
        """The user's forward step on a micro-batch."""
        session, (data, samples) = self.session, batch
        step = torch.tensor(session.steps, device=session.runtime.mesh.device)
        with_logits = session.plugin.return_logits
        model = model_class(session.runtime, session.kind, with_logits, samples, step, self.training)
        if isinstance(data, IndexedBatch):
            data = with_megatron_names(session.kind, data)
        found = self.step.forward_step(iter([data]), model)
        if not isinstance(found, tuple) or len(found) != 2 or not callable(found[1]):
            rule = "must return the model's output and a function of it"
            cure = "Return (output_tensor, partial(self.loss_func, ...)) as GPTTrainStep does"
            raise TrainingError(problem("forward_step", Words(type(found).__name__), rule, cure))
        if isinstance(model, RecordingModel) and not (model.call and isinstance(found[0], PipelineOutput)):
            rule = "must return what the model returned, as it is, with a pipeline"
            raise TrainingError(problem("forward_step", Words(type(found[0]).__name__), rule, CURE))
        return Forward(model, *found)

    def local_share(self, batch: MicroBatch) -> Tensor:
        """`share_of` a micro-batch, without a pipeline."""
        done = self.forward(StepModel, batch)
        return self.share_of(done.loss_func, done.output)

    def share_of(self, loss_func: Callable, output: Any) -> Tensor:
        """The share of a micro-batch in the loss of the call, to be differentiated; its value is kept."""
        found = loss_func(output)
        loss = found[0] if isinstance(found, tuple) and len(found) in (2, 3) else None
        if not isinstance(loss, Tensor) or loss.dim() or not isinstance(found[-1], Mapping):
            raise TrainingError(problem("The loss function", Words(describe(found)), RULE, CURE))
        if self.trains and not loss.requires_grad:
            raise TrainingError(problem("The loss", Words("one without gradient"), "must depend on the output", CURE))
        loss, tokens = loss.to(torch.promote_types(loss.dtype, torch.float32)), None
        if len(found) == 3:
            tokens = torch.as_tensor(found[1], device=loss.device).detach().double()
            if self.session.plugin.calculate_per_token_loss is False:  # asked for by name; else it is over all tokens
                loss, tokens = loss / tokens.clamp(min=1.0).to(loss.dtype), None
        share = loss / (self.shares if tokens is None else self.shares * self.tokens_of_sample)
        self.returned.append(Returned(share.detach(), tokens, dict(found[-1])))
        if found[-1].keys() != self.returned[0].reported.keys():
            names = Words(", ".join(map(str, found[-1])) or "none")
            rule, cure = "must be the same for every micro-batch", "Report a number under each name, always"
            raise TrainingError(problem("The names that a loss function reports", names, rule, cure))
        return share

    def total(self) -> tuple[Tensor, Tensor]:
        """The loss of the call, float32 and the same on all processes, and a factor that its gradients still need."""
        runtime = self.session.runtime
        mesh = runtime.mesh
        sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
        for each in self.returned:
            sums[0] += each.share
            sums[1] += 0.0 if each.tokens is None else each.tokens
        if runtime.pipeline is None:
            mesh.sum_over_data(sums)
        else:
            mesh.all_reduce(sums if mesh.rank("tp") == 0 else sums.zero_())
        factor = torch.where(sums[1] > 0, self.shares * self.tokens_of_sample / sums[1], 1.0)
        return (sums[0] * factor).float(), factor

    def reported(self) -> dict[str, Tensor]:
        """What the loss functions reported, on every process of a pipeline."""
        runtime, device = self.session.runtime, self.session.runtime.mesh.device
        local = self.combined() if self.returned else {}
        if runtime.pipeline is None:
            return local
        mine = {name: (each.shape, each.dtype) for name, each in local.items()} if runtime.has_last_stage else None
        ranks = Ranks(runtime.mesh.device_mesh.get_group("pp"))
        sizes = ranks.collect(lambda: mine, lambda found: next(each for each in found if each is not None))
        return {
            name: runtime.from_last_stage(
                local[name].contiguous() if local else torch.empty(shape, dtype=dtype, device=device)
            )
            for name, (shape, dtype) in sizes.items()
        }

    def combined(self) -> dict[str, Tensor]:
        """Means of numbers over micro-batches; other tensors one after the other, such as logits [b, s, V].

        Where tokens were counted, two numbers are a sum and a count, as in Megatron: their ratio over all processes.
        """
        first, mesh = self.returned[0], self.session.runtime.mesh
        combined = {}
        for name in first.reported:
            values = [torch.as_tensor(each.reported[name], device=mesh.device).detach() for each in self.returned]
            if values[0].dim() == 0:
                combined[name] = torch.stack(values).float().mean()
            elif first.tokens is not None and values[0].shape == (2,):
                total, count = mesh.sum_over_data(torch.stack(values).sum(dim=0).double())
                combined[name] = (total / count).float()
            else:
                combined[name] = torch.cat(values)
        return combined


def step_of(session: Session) -> AbstractTrainStep | None:
    """The train step that the plugin names, made at the first call; None where it names none."""
    plugin = session.plugin
    named = plugin.custom_train_step_class, plugin.custom_loss_function, plugin.custom_get_batch_function
    if session.train_step is None and named != (None, None, None):
        session.train_step = build_train_step(session.kind, step_arguments(session))
    return session.train_step


def call(
    session: Session, step: AbstractTrainStep, batch: Mapping[str, Tensor], samples: Tensor, *, training: bool
) -> Any:  # fmt: skip
    """Run a batch of this data-parallel process through the user's step. Every process calls it.

    batch: transformers' names, or those of an indexed dataset. samples: [b], global numbers of its samples. training:
    the model's mode.
    Returns the step's `model_output_class` with `loss`, `logits` where the loss function reports them, and `losses`,
    all else that it reports; or the loss alone where the class is None. What is minimised is what the loss function
    returns first, whatever it reports.
    """
    runtime, device = session.runtime, session.runtime.mesh.device
    on_device = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in batch.items()}
    if "loss_mask" in batch:  # which transformers' batches never have; model(**batch) has lost the class
        on_device = IndexedBatch(on_device)
    batches = split_rows(on_device, samples.to(device), session)
    if training:
        runtime.seed_device(session.consumed_samples)
    session.reshard()
    run = StepRun(session, step, training, len(batches))
    if runtime.pipeline is None and run.trains and len(batches) == 1:
        share = run.local_share(batches[0])
        value, factor = run.total()
        loss = LocalLoss.apply(share * factor.to(share.dtype), value, session)
    else:
        loss = run_within_call(run, batches)
    reported = run.reported()
    logits = reported.pop("logits", None)
    if logits is not None and run.trains:
        logits = DetachedLogits.apply(logits, torch.zeros((), device=device, requires_grad=True))
    if step.model_output_class is None:
        return loss
    result: Any = step.model_output_class(loss=loss, logits=logits)
    result.losses = reported
    return result


def run_within_call(run: StepRun, batches: Sequence[MicroBatch]) -> Tensor:
    """The loss of the call, whose gradients are made here and multiplied later by the gradient that reaches it."""
    session, runtime, parameters = run.session, run.session.runtime, run.session.parameters
    before = take_gradients(parameters) if run.trains else []
    with torch.set_grad_enabled(run.trains):
        if runtime.pipeline is None:
            run_one_after_the_other(session, batches, run.local_share, run.trains)
        else:
            run_pipeline(run, batches)
    value, factor = run.total()
    if not run.trains:
        return value
    gradients = take_gradients(parameters)
    put_gradients(parameters, before)
    existing = [to_local(gradient) for gradient in gradients if gradient is not None]
    if existing and float(factor) != 1.0:
        torch._foreach_mul_(existing, float(factor))
    return scheduled_loss(session, value, gradients, local=runtime.pipeline is None)


def run_pipeline(run: StepRun, batches: Sequence[MicroBatch]) -> None:
    """The micro-batches by the pipeline's schedule."""
    runtime, scale = run.session.runtime, run.session.loss_scale.scale
    steps = [run.forward(RecordingModel, batch) for batch in batches]
    calls = [step.model.call for step in steps]

    def loss(output: Any, number: int) -> Tensor:
        return run.share_of(steps[number].loss_func, calls[number].results(output)) * scale

    runtime.run([call.arguments for call in calls], loss, run.trains)
    if run.trains:
        for stage in runtime.stages:
            if stage.replicas is not None:
                stage.replicas.finish()


def split_rows(batch: dict[str, Any], samples: Tensor, session: Session) -> list[MicroBatch]:
    """The micro-batches of a batch and of the numbers of its samples: equal in size, as a pipeline needs them.

    There are num_micro_batches of them; for a smaller last batch, whose rows that does not divide, as few more as
    possible: a row that only fills up would count in a loss of the user's own.
    Raises TrainingError where the batch has no rows, or none of these numbers fits the pipeline's schedule.
    """
    rows, parallel = len(samples), session.config.parallel
    wanted, stages = min(rows, session.plugin.num_micro_batches), parallel.pipeline_model_parallel_size
    numbers = [number for number in range(max(1, wanted), rows + 1) if rows % number == 0]
    if stages > 1 and schedule_of(parallel) in LOOPING:  # which runs whole rounds
        numbers = [number for number in numbers if number % max(1, number // stages) == 0]
    if not numbers:
        rule = "must have rows, and so many that micro-batches of equal size fit the pipeline's schedule"
        raise TrainingError(problem("A batch", Words(f"{rows} rows"), rule, "Give the data loader drop_last=True"))
    size = rows // numbers[0]
    parts = []
    for first in range(0, rows, size):
        part = {name: each[first : first + size] if has_rows(each, rows) else each for name, each in batch.items()}
        parts.append((type(batch)(part), samples[first : first + size]))
    return parts


def rows_of(batch: Mapping[str, Any]) -> int:
    """The number of samples of a batch."""
    return next((len(each) for each in batch.values() if isinstance(each, Tensor) and each.dim()), 0)


def has_rows(value: Any, rows: int) -> bool:
    """Whether a value of a batch has a row for each sample."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


def describe(found: Any) -> str:
    """The types of what a loss function returned."""
    if isinstance(found, tuple):
        return f"({', '.join(map(describe, found))})"
    return f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
