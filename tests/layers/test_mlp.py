"""The MLP in each activation, against formulas written out."""

import math

import pytest
import torch
from torch import Tensor

from megalith.layers.mlp import ACTIVATIONS, MLP


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: x.clamp(min=0),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "swiglu": lambda x: x * torch.sigmoid(x),
    "geglu": gelu,
    "geglu_tanh": gelu_tanh,
    "reglu": lambda x: x.clamp(min=0),
    "liglu": lambda x: x,
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_formula(name: str, bias: bool) -> None:
    gated = name.removesuffix("_tanh").endswith("glu")
    mlp = MLP(6, 10, name, gated=gated, bias=bias).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)

    def linear(layer: torch.nn.Linear, y: Tensor) -> Tensor:
        return y @ layer.weight.T + (layer.bias if bias else 0.0)

    act = FORMULAS[name]
    inner = act(linear(mlp.gate, x)) * linear(mlp.up, x) if gated else act(linear(mlp.up, x))
    torch.testing.assert_close(mlp(x), linear(mlp.down, inner))
    assert sum(p.numel() for p in mlp.parameters()) == (3 if gated else 2) * 60 + bias * ((20 if gated else 10) + 6)
