"""The feed-forward half of a transformer layer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.linear import SharedInput


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _tanh_gelu,
    "relu": F.relu,
    "squared_relu": _squared_relu,  # So et al., 2021 (Primer)
    "swiglu": F.silu,  # the gated ones: Shazeer, 2020; the gate is activated, up is not
    "geglu": F.gelu,
    "geglu_tanh": _tanh_gelu,
    "reglu": F.relu,
    "liglu": _identity,
}


class MLP(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int, activation: str, *, gated: bool, bias: bool):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.shared_input = SharedInput()
        self.gate = nn.Linear(hidden, inner, bias=bias) if gated else None
        self.up = nn.Linear(hidden, inner, bias=bias)
        self.down = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, hidden] -> [b, s, hidden]."""
        if self.gate is None:
            (up,) = self.shared_input(x, self.up)
            return self.down(self.activation(up))
        gate, up = self.shared_input(x, self.gate, self.up)
        return self.down(self.activation(gate) * up)
