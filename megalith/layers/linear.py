"""Several linear layers of one input."""

from __future__ import annotations

from torch import Tensor, nn


class SharedInput(nn.Module):
    """Applies several linear layers to one input; it has no parameters of its own.

    It is a module so that a tensor-parallel plan can replace it (parallel/linear.py) by one that gathers the input, and
    sums its gradient, once for all of the layers.
    """

    def forward(self, x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
        """x [b, s, h] -> one [b, s, out] of each layer."""
        return tuple(layer(x) for layer in layers)
