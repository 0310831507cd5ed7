"""Weight gradients put off, for zero-bubble schedules: the backward pass computes gradients of activations and leaves the rest in a queue.

A layer multiplies with a detached weight, so that autograd's own backward pass stops at the activations, and a hook on its
output notes (input, gradient of the output). Later the product is made, once, and handed to autograd at the weight, whence it
goes the usual way into `.grad`: through a DTensor's local part, to hooks, accumulated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gradient = tuple[Tensor, Callable[[], Tensor]]  # a weight, and what computes its gradient


class Queue:
    """The gradients that a backward pass left undone."""

    def __init__(self) -> None:
        self.waiting: list[Gradient] = []

    def put(self, weight: Tensor, compute: Callable[[], Tensor]) -> None:
        """Put off the gradient of a weight."""
        self.waiting.append((weight, compute))

    def take(self) -> Callable[[], None]:
        """Empty the queue; returns what does all the work that was waiting. After each backward pass it is that micro-batch's."""
        work, self.waiting = self.waiting, []
        return functools.partial(run, work)


def run(work: list[Gradient]) -> None:
    """Compute gradients and add them to those of the parameters."""
    while work:
        weight, compute = work.pop(0)
        with torch.no_grad():
            gradient = compute()
        torch.autograd.backward([weight], [gradient])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, queue: Queue) -> Tensor:
    """F.linear, whose gradients of weight and bias are put off."""
    y, kept = F.linear(x, weight.detach(), detach(bias)), x.detach()
    note(queue, lambda: kept, (y,), (weight,), (bias,))
    return y


def detach(x: Tensor | None) -> Tensor | None:
    """The tensor without its history."""
    return None if x is None else x.detach()


def note(
    queue: Queue, whole: Callable[[], Tensor], outputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> None:  # fmt: skip
    """Put off the gradients of layers y = x @ weight.T + bias of one input; `whole` gives x when they are due."""
    for y, weight, bias in zip(outputs, weights, biases, strict=True):
        if y.requires_grad:
            y.register_hook(functools.partial(_put, queue, whole, weight, bias))


def _put(queue: Queue, whole: Callable[[], Tensor], weight: Tensor, bias: Tensor | None, gradient: Tensor) -> None:
    rows = gradient.detach().flatten(0, -2)
    if weight.requires_grad:
        queue.put(weight, lambda: rows.t() @ whole().flatten(0, -2))
    if bias is not None and bias.requires_grad:
        queue.put(bias, lambda: rows.sum(dim=0))


class Linear(nn.Linear):
    """A linear layer whose weight gradient is put off."""

    def __init__(self, old: nn.Linear, queue: Queue):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight, self.bias, self.queue = (
            old.in_features,
            old.out_features,
            old.weight,
            old.bias,
            queue,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias, self.queue)


def defer(model: nn.Module, queue: Queue) -> None:
    """Put off the weight gradients of all linear layers of `model`, a stage that may be split by a tensor-parallel plan."""
    for module in list(model.modules()):
        if hasattr(module, "queue"):  # a tensor-parallel twin
            module.queue = queue
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, Linear(child, queue))
