"""The one seam for products of linear layers, y = x W^T + b: the output, its input's gradient and its weight's.

All linear layers of a placed model compute with one `Matmul`, and `use` gives them another. A number format of its own
(FP8) is a Matmul with other products. Gradients of weights that come later (zero-bubble, pipeline_deferred.py) or are
added up elsewhere than in `.grad` are a Matmul with a `sink`. Without `use`, layers that are not split stay torch's.
Outside it: the head with its loss (layers/loss.py), whose logits are made and used up chunk by chunk; attention.
Shapes: b batch, s sequence, t ranks of the axis, n rows: all tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.parallel.collectives import Axis, finish_gather, start_gather, start_scatter, start_sum, wait


class Sink(Protocol):
    """Takes the gradients of weights and biases in autograd's stead."""

    def put(self, parameter: Tensor, compute: Callable[[], Tensor]) -> None:
        """compute: makes the gradient of `parameter`; to be called once, in the same order on all ranks.

        Of a layer that is split, `parameter` is the local tensor behind the model's DTensor: what gives the gradient
        back to autograd there (pipeline_deferred.py) works in every layout. What keeps it elsewhere sees one such tensor
        for each micro-batch, and gradients that are partial sums over the ranks (sharding.sum_gradients) without it.
        """


class Matmul:
    """The three products (fprop, dgrad, wgrad), on plain tensors of what this rank holds."""

    def __init__(self, sink: Sink | None = None):
        """sink: what gets the gradients of weights and biases, uncomputed (a bias that is added to the sum of several
        ranks' products stays autograd's); None: autograd, in the backward pass.
        """
        self.sink = sink

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in], weight [out, in], bias [out] -> [..., out]."""
        return F.linear(x, weight, bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """gradient [n, out] of the output, weight [out, in] -> [n, in]; plus `total`, that of other layers of x."""
        return gradient @ weight if total is None else torch.addmm(total, gradient, weight)

    def weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """gradient [n, out] of the output, x [n, in] -> [out, in]."""
        return gradient.t() @ x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, matmul: Matmul) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out]."""
    return linears(x, (weight,), (bias,), matmul)[0]


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], matmul: Matmul, axis: Axis | None = None
) -> tuple[Tensor, ...]:  # fmt: skip
    """The outputs [b, s, out/t] of several layers of one input x [b, s, in].

    axis: weights [out/t, in] and biases [out/t] are this rank's; x is gathered, under sequence parallelism from
        [b, s/t, in], and its gradient summed. None: x is what the layers multiply, of any number of dimensions.
    """
    parameters = (*weights, *biases)
    if matmul.sink is None:
        return _Linears.apply(x, matmul, axis, None, *parameters)
    if not x.requires_grad and any(each is not None and each.requires_grad for each in parameters):
        x = x.detach().requires_grad_()  # without any input that needs a gradient there would be no backward pass
    # Detached, so that autograd's own backward pass stops at the activations.
    detached = (None if each is None else each.detach() for each in parameters)
    return _Linears.apply(x, matmul, axis, parameters, *detached)


class _Linears(torch.autograd.Function):
    """Backward, the gradient of x is on its way over the axis while those of the weights are computed.

    Only the local part of x is kept, and gathered again meanwhile, so that sequence parallelism divides its memory.
    """

    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, ...]:
        """arguments: x, the Matmul, the axis or None, targets, weights, as many biases.

        targets: the parameters where `matmul.sink` gets their gradients, else None. The arguments have no names because
        torch.compile (2.13), without gradients, drops ctx where a call has as many as the signature.
        """
        x, matmul, axis, targets, *parameters = arguments
        weights, biases = _halves(parameters)
        ctx.matmul, ctx.axis, ctx.targets = matmul, axis, targets
        ctx.sequence = axis is not None and axis.sequence
        ctx.save_for_backward(x, *weights)
        whole = finish_gather(start_gather(x, axis.size, axis.group), axis.size) if ctx.sequence else x
        return tuple(matmul.output(whole, weight, bias) for weight, bias in zip(weights, biases))

    @staticmethod
    def backward(ctx, *gradients: Tensor):  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        matmul, axis, trained = ctx.matmul, ctx.axis, ctx.needs_input_grad[4:]
        rows = [_rows(gradient) for gradient in gradients]
        if ctx.targets is not None:
            _put(matmul, axis if ctx.sequence else None, x, rows, ctx.targets)
        gather = ctx.sequence and any(trained)
        whole = start_gather(x, axis.size, axis.group) if gather else x
        by_input = None
        if ctx.needs_input_grad[0]:
            for row, weight in zip(rows, weights):
                by_input = matmul.input_gradient(row, weight, by_input)
            by_input = by_input.view(*gradients[0].shape[:-1], -1)
            if axis is not None:
                start = functools.partial(start_scatter, size=axis.size) if ctx.sequence else start_sum
                by_input = start(by_input, group=axis.group)
        flat = _rows(finish_gather(whole, axis.size) if gather else whole)
        by_weight = [matmul.weight_gradient(row, flat) if needed else None for row, needed in zip(rows, trained)]
        by_bias = [row.sum(dim=0) if needed else None for row, needed in zip(rows, trained[len(rows) :])]
        if by_input is not None and axis is not None:
            by_input = wait(by_input)
        return by_input, None, None, None, *by_weight, *by_bias


def _put(matmul: Matmul, axis: Axis | None, x: Tensor, rows: Sequence[Tensor], targets: tuple) -> None:
    """Give the sink what computes the gradients of `targets`. axis: where x is a part of the sequence."""

    @functools.cache
    def whole() -> Tensor:
        return _rows(x if axis is None else finish_gather(start_gather(x, axis.size, axis.group), axis.size))

    for row, weight, bias in zip(rows, *_halves(targets)):
        if weight.requires_grad:
            matmul.sink.put(weight, functools.partial(lambda row: matmul.weight_gradient(row, whole()), row))
        if bias is not None and bias.requires_grad:
            matmul.sink.put(bias, functools.partial(row.sum, dim=0))


def _rows(x: Tensor) -> Tensor:
    """[..., m] -> [n, m]."""
    return x.reshape(-1, x.shape[-1])


def _halves(parameters: Sequence) -> tuple[Sequence, Sequence]:
    """Weights and biases."""
    return parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]


class Linear(nn.Linear):
    """A linear layer that computes with a Matmul, with the parameters of torch's."""

    matmul = Matmul()

    def __init__(self, old: nn.Linear):
        nn.Module.__init__(self)
        self.__dict__.update(old.__dict__)  # parameters, hooks, training

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias, self.matmul)


def use(matmul: Matmul, model: nn.Module) -> None:
    """Make all linear layers in `model` compute with `matmul`; it may be a stage, and split by a plan."""
    made: dict[nn.Module, Linear] = {}  # a layer may have several names
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if type(child) is nn.Linear:
                module._modules[name] = made.setdefault(child, Linear(child))
    for module in model.modules():
        if isinstance(module, Linear):
            module.matmul = matmul
