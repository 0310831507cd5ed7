"""One call of a model in a script: the batch of a training step, or of an evaluation, through the runtime.

Without a pipeline, and where the call is one micro-batch or its logits are wanted, the call makes an ordinary autograd
graph. Otherwise the forward and backward passes of all micro-batches run within the call, one after the other without
a pipeline and by its schedule with one, so that the activations of few of them exist at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megalith.integrations.accelerate.gradients import (
    DetachedLogits,
    LocalLogits,
    LocalLoss,
    put_gradients,
    run_one_after_the_other,
    scheduled_loss,
    take_gradients,
)
from megalith.integrations.accelerate.session import Session
from megalith.models.bert import sequence_loss
from megalith.training.forward_backward import global_counts, model_arguments, run_micro_batches
from megalith.training.tasks import Batch, Task
from megalith.training.tasks_classification import Classification

LOSS_ARGUMENTS = ("labels", "loss_weights", "sentence_order", "order_weights")  # with which models return losses
MOST_DIMS = 3  # of logits
Logits = tuple[Tensor, ...]  # [b, s, V], or of BERT's pre-training also [b, 2], or of classification [b, classes]


class Result(NamedTuple):
    """What a call gives: its loss, 0-dimensional and equal on all processes; the logits of this process's samples."""

    loss: Tensor | None
    logits: Logits | None


class WithLogits(Task):
    """A task whose losses are computed from logits, which it keeps: `kept` has those of each micro-batch.

    With `labelled` False it has no losses.
    """

    def __init__(self, task: Task, labelled: bool = True):
        self.task, self.labelled, self.sequences = task, labelled, task.sequences
        self.classifies = isinstance(task, Classification)
        self.kept: list[Logits] = []

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Those of the task."""
        return self.task.counts(batch) if self.labelled else {}

    def inputs(self, batch: Batch, counts: dict[str, Tensor]) -> Batch:
        """The arguments with which the model returns logits."""
        if not self.labelled:
            ones = torch.ones_like(batch["input_ids"], dtype=torch.float32)
            ids = batch.get("decoder_input_ids", batch["input_ids"])
            batch = {"labels": ids, "loss_mask": ones, **batch}
            counts = {"lm loss": ones.sum(), "classification loss": ones.sum()}
        arguments = self.task.inputs(batch, counts)
        if self.labelled and self.classifies:
            return arguments
        return {name: value for name, value in arguments.items() if name not in LOSS_ARGUMENTS}

    def losses(self, output: Any, batch: Batch, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of one micro-batch, from its logits."""
        outputs = output if isinstance(output, tuple) else (output,)
        if not self.labelled:
            self.kept.append(outputs)
            return {}
        if self.classifies:
            self.kept.append(outputs[1:])
            return self.task.losses(output, batch, counts)
        self.kept.append(outputs)
        arguments = self.task.inputs(batch, counts)
        losses = [cross_entropy(outputs[0], arguments["labels"], arguments["loss_weights"])]
        if "sentence_order" in arguments:
            coordinates = batch.get("coordinates", outputs[1].new_zeros(1))
            order, weights = arguments["sentence_order"], arguments["order_weights"]
            losses.append(sequence_loss(outputs[1], order, weights, coordinates).sum())
        return dict(zip(counts, losses, strict=True))


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The sum of weighted losses; labels below 0 have none. logits [..., V], labels and weights [...]."""
    return (F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="none")
            * weights.flatten()).sum()  # fmt: skip


def call(session: Session, batches: Sequence[Batch], *, labelled: bool, logits: bool, training: bool) -> Result:
    """Run the micro-batches of one call, which have labels or not. Every process calls it.

    logits: whether they are wanted. training: the model's mode.
    """
    runtime, task = session.runtime, session.task
    batches = [runtime.prepare_batch(batch, task.sequences) for batch in batches]
    if training:
        runtime.seed_device(session.consumed_samples)
    if logits or not labelled:
        task = WithLogits(task, labelled)
    session.reshard()
    trains = torch.is_grad_enabled() and session.trains
    graph = runtime.pipeline is None and (len(batches) == 1 or isinstance(task, WithLogits))
    counts = global_counts(runtime, task, batches) if labelled else {}
    if runtime.pipeline is not None:
        loss = _scheduled(session, task, batches, counts, trains)
    elif graph:
        loss = _graph(session, task, batches, counts, trains)
    else:
        loss = _one_after_the_other(session, task, batches, counts, trains)
    if not isinstance(task, WithLogits):
        return Result(loss, None)
    kept = _gathered_logits(session, task, batches)
    if not trains:
        return Result(loss, tuple(each.detach().float() for each in kept))
    if graph and runtime.mesh.size("cp") == 1:
        return Result(loss, tuple(LocalLogits.apply(each, session) for each in kept))
    anchor = torch.zeros((), device=runtime.mesh.device, requires_grad=True)
    return Result(loss, tuple(DetachedLogits.apply(each.float(), anchor) for each in kept))


def _arguments(session: Session, task: Task, batch: Batch, counts: dict[str, Tensor]) -> Batch:
    step = torch.tensor(session.steps, device=session.runtime.mesh.device)
    return model_arguments(task, batch, counts) | {"step": step}


def _part(session: Session, task: Task, batch: Batch, counts: dict[str, Tensor]) -> Tensor:
    """This process's part of the loss of one micro-batch, by an ordinary forward pass."""
    (stage,) = session.runtime.stages
    output = stage.model(**_arguments(session, task, batch, counts))
    losses = task.losses(output, batch, counts)
    return torch.stack(list(losses.values())).sum() if losses else torch.zeros((), device=session.runtime.mesh.device)


def _graph(session: Session, task: Task, batches: Sequence[Batch], counts: dict, trains: bool) -> Tensor | None:
    parts = [_part(session, task, batch, counts) for batch in batches]
    if not trains:
        session.reshard()
    if not counts:
        return None
    part = torch.stack(parts).sum()
    value = _total(session, part.detach())
    return LocalLoss.apply(part, value, session) if trains else value


def _one_after_the_other(
    session: Session, task: Task, batches: Sequence[Batch], counts: dict, trains: bool
) -> Tensor | None:  # fmt: skip
    parameters = session.parameters
    before = take_gradients(parameters) if trains else []
    parts = run_one_after_the_other(session, batches, lambda batch: _part(session, task, batch, counts), trains)
    value = _total(session, torch.stack(parts).sum())
    if not trains:
        return value
    gradients = take_gradients(parameters)
    put_gradients(parameters, before)
    return scheduled_loss(session, value, gradients, local=True)


def _scheduled(
    session: Session, task: Task, batches: Sequence[Batch], counts: dict, trains: bool
) -> Tensor | None:  # fmt: skip
    runtime = session.runtime
    if not counts:
        with torch.no_grad():
            inputs = [_arguments(session, task, batch, counts) for batch in batches]
            zero = torch.zeros((), device=runtime.mesh.device)
            runtime.run(inputs, lambda output, number: (task.losses(output, batches[number], counts), zero)[1], False)
        return None
    parameters = session.parameters
    before = take_gradients(parameters) if trains else []
    scale = session.loss_scale.scale
    with torch.set_grad_enabled(trains):
        sums = run_micro_batches(runtime, task, batches, counts, session.steps, train=trains, loss_scale=scale)
    value = runtime.mesh.all_reduce(sums)[: len(counts)].sum().float()
    if not trains:
        return value
    for stage in runtime.stages:
        if stage.replicas is not None:
            stage.replicas.finish()
    gradients = take_gradients(parameters)
    put_gradients(parameters, before)
    return scheduled_loss(session, value, gradients, local=False)


def _total(session: Session, part: Tensor) -> Tensor:
    """The sum of the parts of a loss over data- and context-parallel processes, float32."""
    return session.runtime.mesh.sum_over_data(part.double()).float()


def _gathered_logits(session: Session, task: WithLogits, batches: Sequence[Batch]) -> Logits:
    """The logits of this process's samples on every process, of whole sequences."""
    runtime = session.runtime
    mesh, model = runtime.mesh, session.config.model
    joined = [torch.cat(parts) for parts in zip(*task.kept)]
    if runtime.pipeline is not None:
        joined = _from_last_stage(session, joined)
    if mesh.size("cp") == 1:
        return tuple(joined)
    name = "decoder_coordinates" if model.decoder_layers else "coordinates"
    positions = batches[0][name]
    group = mesh.device_mesh.get_group("cp")
    whole = []
    for each in joined:
        if each.dim() == 3:
            full = each.new_zeros(each.shape[0], positions.numel() * mesh.size("cp"), each.shape[2])
            full[:, positions] = each.detach()
        else:  # of the first token
            full = each.detach() * float(positions[0] == 0)
        dist.all_reduce(full, group=group)
        whole.append(full)
    return tuple(whole)


def _from_last_stage(session: Session, tensors: list[Tensor]) -> list[Tensor]:
    """Tensors [b, ...] of the last stage, float32, on the other stages' processes too."""
    runtime, device = session.runtime, session.runtime.mesh.device
    shapes = torch.zeros(2, MOST_DIMS, dtype=torch.int64, device=device)  # rows of zeros: no such tensor
    for row, tensor in zip(shapes, tensors):
        row[: tensor.dim()] = torch.tensor(tensor.shape)
    received = []
    for number, shape in enumerate(runtime.from_last_stage(shapes).tolist()):
        if size := [length for length in shape if length]:
            values = tensors[number].detach().float().contiguous() if tensors else torch.empty(size, device=device)
            received.append(runtime.from_last_stage(values))
    return received
