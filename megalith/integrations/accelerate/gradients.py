"""Losses that a script differentiates, and what the gradient that reaches them does.

Two kinds of calls of a model make them (calls.py). In the first the loss is part of an ordinary autograd graph. In the
second, pipelines' above all, the forward and backward passes are done when the loss is returned: its gradient scales
the gradients that they left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalith.common.errors import TrainingError
from megalith.integrations.accelerate.session import Session
from megalith.parallel.sharding import to_local

CURE = "Compute it in the loss function of a custom train step (custom_train_step_class)"
ONCE = (
    "The loss of a call can be differentiated once. Add losses up and call backward on the sum, or call the model "
    f"again. {CURE} where a loss needs more."
)


class Pending:
    """The gradients of one call whose loss has not been differentiated yet.

    local: whether they are still to be summed over data-parallel replicas.
    """

    def __init__(self, session: Session, gradients: list[Tensor | None], *, local: bool):
        self.session, self.gradients, self.local = session, gradients, local


def take_gradients(parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """The gradients of parameters, which have none afterwards."""
    taken = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return taken


def put_gradients(parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
    """Give parameters the gradients that `take_gradients` took from them."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def run_one_after_the_other(
    session: Session, batches: Sequence[Any], part_of: Callable[[Any], Tensor], trains: bool
) -> list[Tensor]:  # fmt: skip
    """Run micro-batches without a pipeline, so that the activations of one of them exist at a time.

    part_of: runs one forward, and returns this process's part of its loss. Returns the values of the parts.
    """
    parts, (stage,) = list[Tensor](), session.runtime.stages
    for number, batch in enumerate(batches, start=1):
        part = part_of(batch)
        if trains:
            if stage.wrapped:
                stage.set_gradient_sync(last=number == len(batches))
            (part * session.loss_scale.scale).backward()
        parts.append(part.detach())
    if not trains:
        stage.reshard()
    return parts


def scheduled_loss(session: Session, value: Tensor, gradients: list[Tensor | None], *, local: bool) -> Tensor:
    """A loss whose backward pass is done. gradients: of session.parameters. local: see Pending."""
    anchor = torch.zeros((), device=value.device, requires_grad=True)  # a stage may have no parameter that is trained
    return ScheduledLoss.apply(value, Pending(session, gradients, local=local), *session.parameters, anchor)


class ScheduledLoss(torch.autograd.Function):
    """See scheduled_loss: apply(value, pending, *parameters, anchor)."""

    @staticmethod
    def forward(ctx, value: Tensor, pending: Pending, *parameters: Tensor) -> Tensor:
        """value: the loss. parameters: those of this process, in the order of `pending.gradients`."""
        ctx.pending = pending
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        pending, ctx.pending = ctx.pending, None
        if pending is None:
            raise TrainingError(ONCE)
        _refuse_create_graph()
        _require_backward(node for node, _ in ctx.next_functions)
        session = pending.session
        factor = upstream.double()
        _check_equal(factor, session)
        session.add_gradients(local=pending.local)
        gradients = [gradient for gradient in pending.gradients if gradient is not None]
        if gradients and float(factor) != 1.0:
            torch._foreach_mul_([to_local(gradient) for gradient in gradients], float(factor))
        return None, None, *pending.gradients, None


def _refuse_create_graph() -> None:
    """Raise TrainingError within a backward pass with create_graph=True."""
    if torch.is_grad_enabled():
        raise TrainingError(f"create_graph=True needs gradients of gradients, which a call does not have. {CURE}.")


def _require_backward(nodes: Iterable[Any]) -> None:
    """Raise TrainingError within torch.autograd.grad on parameters, whose result would be one process's part.

    nodes: those that add gradients up in parameters; None for others.
    """
    for node in nodes:
        try:
            if node is not None and torch._C._will_engine_execute_node(node):
                return  # in a backward pass alone
        except RuntimeError as error:  # of a parameter whose gradient is to be returned
            raise TrainingError(
                f"torch.autograd.grad on parameters would give this process's part of the gradients alone. Call "
                f"accelerator.backward(loss) and read parameter.grad after accelerator.clip_grad_norm_. {CURE}."
            ) from error


def _check_equal(factor: Tensor, session: Session) -> None:
    """Raise TrainingError on all processes where the gradients that reached the loss differ between them."""
    if session.runtime.mesh.world_size == 1:
        return
    extremes = torch.stack((factor, -factor))
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    largest, smallest = extremes[0].item(), -extremes[1].item()
    if largest != smallest:
        raise TrainingError(
            f"The gradient that reaches the loss of a call must be the same on all processes; found {smallest:g} to "
            f"{largest:g}. Multiply the loss by one number on all of them. {CURE} where samples weigh differently."
        )


class LocalLoss(torch.autograd.Function):
    """This process's part of a loss, with the value of the whole: apply(part, value, session)."""

    @staticmethod
    def forward(ctx, part: Tensor, value: Tensor, session: Session) -> Tensor:
        """part, value: 0-dimensional; value is the sum of all processes' parts."""
        ctx.session = session
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        session, ctx.session = ctx.session, None
        if session is None:
            raise TrainingError(ONCE)
        begin_backward(session)
        return upstream * session.loss_scale.scale, None, None


class LocalLogits(torch.autograd.Function):
    """Float32 logits from which a script computes the loss of its samples; these are averaged over the processes."""

    @staticmethod
    def forward(ctx, logits: Tensor, session: Session) -> Tensor:
        ctx.session, ctx.dtype = session, logits.dtype
        return logits.float() if logits.dtype != torch.float32 else logits.view_as(logits)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        begin_backward(ctx.session)
        factor = ctx.session.loss_scale.scale / ctx.session.runtime.mesh.data_size
        return (upstream * factor).to(ctx.dtype), None  # fp16's scale comes before the cast, which would lose them


class DetachedLogits(torch.autograd.Function):
    """Logits that cannot be differentiated, and say so: apply(logits, a tensor that requires a gradient)."""

    @staticmethod
    def forward(ctx, logits: Tensor, anchor: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        raise TrainingError(
            "A loss computed from the logits of a pipeline, of a call with several micro-batches, or of sequences that "
            f"context parallelism splits, has no gradient: the passes are run within the call. {CURE}, or use "
            "outputs.loss."
        )


def begin_backward(session: Session) -> None:
    """Before gradients of an ordinary graph are added: announce the pass to fully_shard and to the session.

    Raises TrainingError for create_graph, and for torch.autograd.grad where its result would be a part, or scaled.
    """
    _refuse_create_graph()
    if session.runtime.mesh.world_size > 1 or session.loss_scale.scale != 1.0:
        trained = (each for each in session.parameters if each.requires_grad)
        _require_backward(torch.autograd.graph.get_gradient_edge(each).node for each in trained)
    session.add_gradients(local=True)
    (stage,) = session.runtime.stages
    if stage.wrapped:
        stage.set_gradient_sync(last=session.gradient_state.sync_gradients)
