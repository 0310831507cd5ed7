"""One layer: where the residual is taken, and where dropout acts."""

import pytest
import torch

from megalith.layers.attention import CoreAttention, SelfAttention
from megalith.layers.block import Block
from megalith.layers.dropout import row_keys
from megalith.layers.mask import AttentionMask
from megalith.layers.mlp import MLP


def block(
    norm: str = "layernorm", dropout: float = 0.0, normed_residual: bool = False, norm_after: bool = False
) -> Block:
    torch.manual_seed(0)
    attention = SelfAttention(8, 2, 2, 4, bias=True, qkv_bias=True, core=CoreAttention(0.0, "s"))
    layer = Block(
        8,
        norm,
        1e-5,
        attention,
        MLP(8, 16, "gelu", gated=False, bias=True),
        dropout=dropout,
        site="layers.0",
        normed_residual=normed_residual,
        norm_after=norm_after,
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.double()


@pytest.mark.parametrize("normed_residual", [False, True])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_residuals(norm: str, normed_residual: bool) -> None:
    layer, x, mask = (
        block(norm, normed_residual=normed_residual),
        torch.randn(2, 5, 8, dtype=torch.float64),
        AttentionMask(),
    )

    def normed(module: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
        if norm == "layernorm":
            y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
            return y * module.weight + module.bias
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight

    first = normed(layer.attention_norm, x)
    y = (first if normed_residual else x) + layer.attention(first, mask, None)
    second = normed(layer.mlp_norm, y)
    expected = (second if normed_residual else y) + layer.mlp(second)
    torch.testing.assert_close(layer(x, mask, None, None), expected)


def test_norms_after_residuals() -> None:
    layer, x, mask = block(norm_after=True), torch.randn(2, 5, 8, dtype=torch.float64), AttentionMask(causal=False)
    y = layer.attention_norm(x + layer.attention(x, mask, None))
    torch.testing.assert_close(layer(x, mask, None, None), layer.mlp_norm(y + layer.mlp(y)))


@pytest.mark.parametrize("two_norms", [False, True])
def test_side_by_side(two_norms: bool) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(8, 2, 2, 4, bias=True, qkv_bias=True, core=CoreAttention(0.0, "s"))
    mlp = MLP(8, 16, "gelu", gated=False, bias=True)
    layer = Block(
        8, "layernorm", 1e-5, attention, mlp, dropout=0.0, site="layers.0", parallel=True, two_norms=two_norms
    ).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, mask = torch.randn(2, 5, 8, dtype=torch.float64), AttentionMask()
    beside = layer.mlp_norm(x) if two_norms else layer.attention_norm(x)
    torch.testing.assert_close(
        layer(x, mask, None, None), x + attention(layer.attention_norm(x), mask, None) + mlp(beside)
    )


def test_dropout_acts_on_both_branches_by_different_masks() -> None:
    layer, x, mask = block(dropout=0.5), torch.randn(2, 5, 8, dtype=torch.float64), AttentionMask()
    rows = row_keys(1, torch.tensor(0), torch.tensor([4, 5]), torch.arange(5))
    seen = {}
    for name in ("attention_dropout", "mlp_dropout"):
        getattr(layer, name).register_forward_hook(
            lambda module, args, out, name=name: seen.__setitem__(name, out == 0)
        )
    layer(x, mask, None, rows)
    assert 0.2 < seen["attention_dropout"].float().mean() < 0.8
    assert not torch.equal(seen["attention_dropout"], seen["mlp_dropout"])
