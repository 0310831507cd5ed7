"""Weight gradients put off, for zero-bubble schedules: the backward pass computes gradients of activations alone.

A `Matmul(Queue())` (matmul.py) leaves the others in the queue. Later each is computed, once, and handed to autograd at
the weight, whence it goes the usual way into `.grad`: through a DTensor's local part, to hooks, accumulated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Gradient = tuple[Tensor, Callable[[], Tensor]]  # a weight, and what computes its gradient


class Queue:
    """The gradients that a backward pass left undone."""

    def __init__(self) -> None:
        self.waiting: list[Gradient] = []

    def put(self, parameter: Tensor, compute: Callable[[], Tensor]) -> None:
        """Put off the gradient of a weight or a bias."""
        self.waiting.append((parameter, compute))

    def take(self) -> Callable[[], None]:
        """Empty the queue; returns what does all that was waiting: after each backward pass, that micro-batch's."""
        work, self.waiting = self.waiting, []
        return functools.partial(run, work)


def run(work: list[Gradient]) -> None:
    """Compute gradients and add them to those of the parameters."""
    while work:
        parameter, compute = work.pop(0)
        with torch.no_grad():
            gradient = compute()
        torch.autograd.backward([parameter], [gradient])
