"""Several linear layers of one input."""

from __future__ import annotations

from torch import Tensor, nn


class SharedInput(nn.Module):
    """Applies several linear layers to one input; parameterless, so that a plan may replace it by one that fetches the input once."""

    def forward(self, x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """x [b, s, h] -> one [b, s, out] of each layer."""
        return tuple(linear(x) for linear in linears)
