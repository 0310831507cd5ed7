"""The matrix products of linear layers, y = x W^T + b: the output, the input's gradient and the weight's.

All linear layers that a tensor-parallel plan has split or replicated compute with one `Matmul`; `set_matmul` gives all
linear layers of a model another. A number format of its own (FP8) is a Matmul with other products. Weight gradients
that are deferred (zero bubble, parallel/pipeline/deferred.py) or accumulated elsewhere than in `.grad` need a Matmul
with a `sink`. Without `set_matmul`, layers that no plan names stay torch's.
Not covered: the head with its loss (layers/loss.py), which uses up its logits chunk by chunk; the products of queries,
keys and values in attention.
Shapes: b batch, s sequence, t ranks of the axis, m = b x s tokens. in, out: features, in a split layer this rank's.
What is split and which collective runs where: the table in linear.py. Layers may have adapters (lora.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.parallel.collectives import (
    Axis,
    finish_all_gather,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from megalith.parallel.mappings import copy_to_tensor_model_parallel_region
from megalith.parallel.sharding import to_local


class Sink(Protocol):
    """Takes the gradients of weights and biases instead of autograd."""

    def put(self, parameter: Tensor, compute: Callable[[], Tensor]) -> None:
        """compute: returns the gradient of `parameter`; to be called once, in the same order on all ranks.

        The order matters because under sequence parallelism it may gather the layer's input. Of a layer that a plan
        names, `parameter` is the local tensor of the model's DTensor. A sink that gives the gradient back to autograd
        there (pipeline/deferred.py) works in every layout. One that keeps it elsewhere gets another such tensor for
        each micro-batch, and must sum partial gradients itself (as sharding.py, sum_partial_gradients).
        """


class Matmul:
    """The three products of local tensors: `output` (fprop), `input_gradient` (dgrad), `weight_gradient` (wgrad)."""

    def __init__(self, sink: Sink | None = None):
        """sink: gets functions that compute the gradients of weights and biases; None: autograd computes them.

        The bias of a row-parallel layer, which is added after the sum over the ranks, stays with autograd.
        """
        self.sink = sink

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in], weight [out, in], bias [out] -> [..., out]."""
        return F.linear(x, weight, bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """gradient [m, out] of the output, weight [out, in] -> [m, in].

        total: the sum [m, in] of the input gradients of other layers of the same x, to which this one is added.
        """
        return gradient @ weight if total is None else torch.addmm(total, gradient, weight)

    def weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """gradient [m, out] of the output, x [m, in] -> [out, in]."""
        return gradient.t() @ x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, matmul: Matmul) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out]; no collective."""
    return linears_of_one_input(x, (weight,), (bias,), matmul)[0]


def linears_of_one_input(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], matmul: Matmul, axis: Axis | None = None
) -> tuple[Tensor, ...]:  # fmt: skip
    """The outputs [b, s, out] of several layers of one input x [b, s, in]: one tensor for each layer.

    weights, biases: [out, in] and [out] (or None) of each layer; of layers split by outputs, this rank's.
    axis: over its ranks the gradient of x is all-reduced. Under sequence parallelism x is [b, s/t, in], gathered to
        [b, s, in], and its gradient is reduce-scattered. None: no collective, and x has any number of dimensions.
    """
    parameters = (*weights, *biases)
    if matmul.sink is None:
        return _Linears.apply(x, matmul, axis, None, *parameters)
    if not x.requires_grad and any(each is not None and each.requires_grad for each in parameters):
        # Without any input that needs a gradient there would be no backward pass. That of x is computed in vain.
        x = x.detach().requires_grad_()
    # Detached, so that autograd's own backward pass stops at the activations.
    detached = (None if each is None else each.detach() for each in parameters)
    return _Linears.apply(x, matmul, axis, parameters, *detached)


class _Linears(torch.autograd.Function):
    """In the backward pass the collective of x's gradient overlaps the products of the weights' gradients.

    Under sequence parallelism only the local shard of x is kept, so that its memory is divided by t. It is gathered
    again for the weight gradients, and that overlaps the product of the input gradient. With a sink, which computes
    the weight gradients itself, neither collective overlaps products.
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
        ctx.sequence_parallel = axis is not None and axis.sequence_parallel
        ctx.save_for_backward(x, *weights)
        if ctx.sequence_parallel:
            x = finish_all_gather(start_all_gather(x, axis.size, axis.group), axis.size)
        return tuple(matmul.output(x, weight, bias) for weight, bias in zip(weights, biases))

    @staticmethod
    def backward(ctx, *gradients: Tensor):  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        matmul, axis, trained = ctx.matmul, ctx.axis, ctx.needs_input_grad[4:]
        # Gradients with respect to the outputs, [m, out] of each; likewise by_input, by_weight and by_bias.
        by_output = [_by_token(gradient) for gradient in gradients]
        if ctx.targets is not None:
            _give_to_sink(matmul, axis if ctx.sequence_parallel else None, x, by_output, ctx.targets)
        gather = ctx.sequence_parallel and any(trained)
        gathered = start_all_gather(x, axis.size, axis.group) if gather else x
        by_input = None
        if ctx.needs_input_grad[0]:
            for gradient, weight in zip(by_output, weights):
                by_input = matmul.input_gradient(gradient, weight, by_input)
            by_input = by_input.view(*gradients[0].shape[:-1], -1)
            if ctx.sequence_parallel:
                by_input = start_reduce_scatter(by_input, axis.size, axis.group)
            elif axis is not None:
                by_input = start_all_reduce(by_input, axis.group)
        flat = _by_token(finish_all_gather(gathered, axis.size) if gather else gathered)
        by_weight = [
            matmul.weight_gradient(gradient, flat) if needed else None for gradient, needed in zip(by_output, trained)
        ]
        by_bias = [
            gradient.sum(dim=0) if needed else None for gradient, needed in zip(by_output, trained[len(weights) :])
        ]
        if by_input is not None and axis is not None:
            by_input = wait(by_input)
        return by_input, None, None, None, *by_weight, *by_bias


def _give_to_sink(
    matmul: Matmul, axis: Axis | None, x: Tensor, by_output: Sequence[Tensor], targets: tuple
) -> None:  # fmt: skip
    """Give the sink functions that compute the gradients of `targets`, weights and as many biases.

    axis: along which x [b, s/t, in] is to be gathered, once for all of the weights; None: x is whole.
    by_output: the gradient [m, out] of each layer's output.
    """

    @functools.cache
    def gathered() -> Tensor:
        all_tokens = x if axis is None else finish_all_gather(start_all_gather(x, axis.size, axis.group), axis.size)
        return _by_token(all_tokens)

    for gradient, weight, bias in zip(by_output, *_halves(targets)):
        if weight.requires_grad:
            compute = functools.partial(lambda gradient: matmul.weight_gradient(gradient, gathered()), gradient)
            matmul.sink.put(weight, compute)
        if bias is not None and bias.requires_grad:
            matmul.sink.put(bias, functools.partial(gradient.sum, dim=0))


def _by_token(x: Tensor) -> Tensor:
    """[..., features] -> [m, features]."""
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
        self.lora: Any = None  # an adapter (lora.py, Adapter)

    def local_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as local tensors."""
        return to_local(self.weight), to_local(self.bias)

    def local_adapter(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and, of DoRA, the magnitudes of the adapter as local tensors."""
        return to_local(self.lora.a), to_local(self.lora.b), to_local(self.lora.m)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return layer_outputs(x, [self])[0]


def layer_outputs(
    x: Tensor, layers: Sequence[Linear], axis: Axis | None = None, biased: bool = True
) -> tuple[Tensor, ...]:  # fmt: skip
    """The outputs of several layers of one input, with those of their adapters: shapes as `linears_of_one_input`.

    The products A x are those of more layers of this input, which so share its collectives. With dropout they have
    inputs of their own: then x is gathered before, is kept whole under sequence parallelism, and nothing overlaps.
    biased: False leaves out the layers' biases.
    """
    matmul = layers[0].matmul
    weights, biases = zip(*(layer.local_parameters() for layer in layers))
    biases = biases if biased else (None,) * len(layers)
    adapted = [layer for layer in layers if layer.lora is not None]
    if not adapted:
        return linears_of_one_input(x, weights, biases, matmul, axis)
    down, up, magnitudes = zip(*(layer.local_adapter() for layer in adapted))
    dora = magnitudes[0] is not None  # it scales what is before the bias
    early, late = ((None,) * len(layers), biases) if dora else (biases, (None,) * len(layers))
    if adapted[0].lora.drops:
        if axis is not None:
            x, axis = copy_to_tensor_model_parallel_region(x, axis), None
        outputs = linears_of_one_input(x, weights, early, matmul)
        inner = tuple(linear(layer.lora.dropped(x), a, None, matmul) for layer, a in zip(adapted, down))
    else:
        unbiased = (None,) * len(adapted)
        both = linears_of_one_input(x, (*weights, *down), (*early, *unbiased), matmul, axis)
        outputs, inner = both[: len(layers)], both[len(layers) :]
    scaled = (each * layer.lora.scale for each, layer in zip(inner, adapted))
    adapters = zip([linear(each, b, None, matmul) for each, b in zip(scaled, up)], down, up, magnitudes)
    found = []
    for y, layer, weight, bias in zip(outputs, layers, weights, late):
        if layer.lora is not None:
            added, a, b, m = next(adapters)
            y = y + added
            y = y * (m / layer.lora.lengths(weight, a, b)).to(y.dtype) if dora else y
        found.append(y if bias is None else y + bias)
    return tuple(found)


def set_matmul(matmul: Matmul, model: nn.Module) -> None:
    """Make all linear layers in `model` compute with `matmul`; the model may be a stage, and split by a plan."""
    replaced: dict[nn.Module, Linear] = {}  # a layer may have several names
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if type(child) is nn.Linear:
                module._modules[name] = replaced.setdefault(child, Linear(child))
    for module in model.modules():
        if isinstance(module, Linear):
            module.matmul = matmul
