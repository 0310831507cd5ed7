"""Deferred weight gradients, for zero-bubble schedules: the backward pass leaves out those of the linear layers.

A `Matmul(WeightGradientQueue())` (parallel/matmul.py) puts them into the queue as functions. Later each is computed,
once, and given to autograd at the weight. From there it reaches `.grad` as usual: through the DTensor and all hooks.
The gradients of other parameters (embedding, norms, head, biases of row-parallel layers) are not deferred.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

DeferredGradient = tuple[Tensor, Callable[[], Tensor]]  # a weight or bias, and a function that computes its gradient


class WeightGradientQueue:
    """The weight gradients that the backward passes of one stage have deferred."""

    def __init__(self) -> None:
        self.deferred: list[DeferredGradient] = []

    def put(self, parameter: Tensor, compute: Callable[[], Tensor]) -> None:
        """Defer the gradient of a weight or a bias."""
        self.deferred.append((parameter, compute))

    def take(self) -> Callable[[], None]:
        """Empty the queue; returns a function that computes what was in it, and adds it to the gradients.

        Called after each backward pass, so that what it returns is the deferred work of one micro-batch.
        """
        deferred, self.deferred = self.deferred, []
        return functools.partial(run, deferred)


def run(deferred: list[DeferredGradient]) -> None:
    """Compute gradients and add them to `.grad` of their parameters; empties the list, which frees the activations."""
    while deferred:
        parameter, compute = deferred.pop(0)
        with torch.no_grad():
            gradient = compute()
        torch.autograd.backward([parameter], [gradient])
