"""Every path through core attention gives the values and gradients of a reference written here in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megalith.layers.attention import QUERY_BLOCK, CoreAttention, CrossAttention, SelfAttention
from megalith.layers.dropout import row_keys
from megalith.layers.mask import AttentionMask
from megalith.layers.positions import alibi_slopes, rotary_table

BATCH, HEADS, WIDTH = 2, 4, 8
LENGTH = QUERY_BLOCK + 44  # more than one block of queries, the last one partial


def documents() -> Tensor:
    """Three documents in row 0, two in row 1."""
    positions = torch.arange(LENGTH)
    return torch.stack([(positions >= 50).int() + (positions >= 270).int(), (positions >= 123).int()])


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "both ways": {"causal": False},
    "alibi": {"slopes": alibi_slopes(HEADS)},
    "documents": {"documents": documents()},
    "window": {"window": 9},
    "window of two blocks": {"window": QUERY_BLOCK + 10},
    "window that hides nothing": {"window": LENGTH},
    "padding": {"causal": False, "padding": torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [77]])},
    "padding before the tokens": {"padding": torch.arange(LENGTH)[None] >= torch.tensor([[0], [277]])},
    "padding on both sides": {
        "padding": (torch.arange(LENGTH)[None] - torch.tensor([[9], [123]])).abs() < 9,
        "slopes": alibi_slopes(HEADS),
        "documents": documents(),
        "window": 99,
    },
    "all": {"slopes": alibi_slopes(HEADS), "documents": documents(), "window": 99},
}


def draw(kv_heads: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, HEADS, LENGTH, WIDTH)] + [(BATCH, kv_heads, LENGTH, WIDTH)] * 2 + [(BATCH, HEADS, LENGTH, WIDTH)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def reference(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v with loops over heads and a dense mask built by comparing numbers."""
    group, positions = q.shape[1] // k.shape[1], torch.arange(q.shape[2])
    query, key = positions[:, None], positions[None, :]
    out = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].transpose(1, 2) / math.sqrt(q.shape[-1])
        if mask.slopes is not None:
            scores = scores + mask.slopes[head].double() * (key - query)
        hidden = torch.zeros(q.shape[0], q.shape[2], q.shape[2], dtype=torch.bool)
        if mask.causal:
            hidden |= key > query
        if mask.window is not None:
            hidden |= key <= query - mask.window
        if mask.documents is not None:
            hidden |= mask.documents[:, :, None] != mask.documents[:, None, :]
        if mask.padding is not None:
            hidden |= ~mask.padding[:, None, :]
        blind = hidden.all(dim=-1, keepdim=True).expand_as(scores)  # what sees no key has an output of 0
        weights = scores.masked_fill(hidden & ~blind, -math.inf).softmax(-1).masked_fill(blind, 0.0)
        out.append(weights @ v[:, head // group])
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("form", MASKS)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "explicit", "flex"])
def test_fewer_queries_are_the_last_ones(backend: str, form: str) -> None:
    """A part of a sequence: queries from position 30 to 290, all keys before them."""
    q, k, v, upstream = draw(2)
    core, mask, first = CoreAttention(0.25, "site", backend), AttentionMask(**MASKS[form]), 30
    if form == "causal" and backend == "explicit":
        mask = mask._replace(dropout_keys=row_keys(1, torch.tensor(3), torch.tensor([10, 11]), torch.arange(LENGTH)))
    last = 290 if mask.causal else LENGTH
    leaves = [x.requires_grad_(backend != "flex") for x in (q, k, v)]  # flex has no backward pass on the CPU
    expected = core(*leaves, mask)[:, :, first:last]
    rows = None if mask.dropout_keys is None else mask.dropout_keys[:, first:last]
    got = core(q[:, :, first:last], k[:, :, :last], v[:, :, :last], mask._replace(dropout_keys=rows))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    if backend != "flex":
        upstream = upstream[:, :, first:last]
        for actual, correct in zip(
            torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)
        ):
            torch.testing.assert_close(actual, correct, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("form", MASKS)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "explicit"])
def test_path_equals_reference(backend: str, form: str, kv_heads: int) -> None:
    q, k, v, upstream = draw(kv_heads)
    mask = AttentionMask(**MASKS[form])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = reference(*leaves, mask)
    got = CoreAttention(0.0, "site", backend)(*leaves, mask)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for actual, correct in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)
    ):
        torch.testing.assert_close(actual, correct, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("form", MASKS)
def test_flex_forward_equals_reference(form: str, kv_heads: int) -> None:
    """FlexAttention has no backward on the CPU, so only values are compared."""
    q, k, v, _ = draw(kv_heads, dtype=torch.float32)
    mask = AttentionMask(**MASKS[form])
    got = CoreAttention(0.0, "site", "flex")(q, k, v, mask)
    torch.testing.assert_close(got.double(), reference(q.double(), k.double(), v.double(), mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["causal", "alibi"])
def test_half_precision_is_near(form: str) -> None:
    q, k, v, _ = draw(2, dtype=torch.bfloat16)
    mask = AttentionMask(**MASKS[form])
    exact = reference(q.double(), k.double(), v.double(), mask)
    for backend in ("auto", "explicit"):
        got = CoreAttention(0.0, "site", backend)(q, k, v, mask)
        assert got.dtype == torch.bfloat16
        assert (got.double() - exact).norm() < 0.01 * exact.norm(), backend


def test_large_scores_do_not_overflow_float16() -> None:
    """A product over 65504 is infinite there, though the scaled score is not."""
    q, v = 40 * torch.randn(1, 1, 8, 64, generator=torch.Generator().manual_seed(0)), torch.eye(8, 64)[None, None]
    found = CoreAttention(0.0, "site", "explicit")(q.half(), q.half(), v.half(), AttentionMask())
    assert torch.allclose(found.float(), CoreAttention(0.0, "site", "explicit")(q, q, v, AttentionMask()), atol=1e-3)


def test_half_precision_keeps_long_distances_apart() -> None:
    """Query 0 prefers the last of 2048 keys by e to one; in bfloat16 itself the last biases are all 2048 and tie."""
    zeros = torch.zeros(1, 1, 2048, 8, dtype=torch.bfloat16)
    v = torch.arange(2047, -1, -1).clamp(max=64).view(1, 1, 2048, 1).expand(1, 1, 2048, 8).bfloat16()
    got = CoreAttention(0.0, "s")(zeros, zeros, v, AttentionMask(causal=False, slopes=torch.tensor([1.0])))
    assert got[0, 0, 0, 0].item() == pytest.approx(1 / (math.e - 1), rel=0.01)


@pytest.mark.parametrize("form", ["causal", "alibi", "documents"])
def test_dropout_of_probabilities_is_a_hash(form: str) -> None:
    """The same rows drop the same probabilities, one call or two, and their mean is the answer without dropout."""
    q, k, v, _ = draw(2)
    core, step = CoreAttention(0.25, "layers.0.scores"), torch.tensor(3)
    rows = row_keys(1, step, torch.tensor([10, 11]), torch.arange(LENGTH))
    mask = AttentionMask(**MASKS[form], dropout_keys=rows)
    first = core(q, k, v, mask)
    assert torch.equal(first, core(q, k, v, mask))
    alone = core(
        q[1:],
        k[1:],
        v[1:],
        mask._replace(dropout_keys=rows[1:], documents=None if mask.documents is None else mask.documents[1:]),
    )
    torch.testing.assert_close(first[1:], alone, rtol=1e-12, atol=1e-12)
    next_keys = row_keys(1, step + 1, torch.tensor([10, 11]), torch.arange(LENGTH))
    assert not torch.allclose(first, core(q, k, v, mask._replace(dropout_keys=next_keys)))
    core.eval()
    without = core(q, k, v, mask)
    torch.testing.assert_close(without, reference(q, k, v, mask), rtol=1e-10, atol=1e-10)
    core.train()
    keys_of_steps = [row_keys(1, torch.tensor(t), torch.tensor([10, 11]), torch.arange(LENGTH)) for t in range(200)]
    draws = [core(q, k, v, mask._replace(dropout_keys=keys)) for keys in keys_of_steps]
    spread = torch.stack(draws).std(0).mean() / math.sqrt(len(draws))
    assert (torch.stack(draws).mean(0) - without).abs().mean() < 1.2 * spread


def test_heads_draw_different_masks_and_a_part_of_the_heads_the_same_ones() -> None:
    q, k, v, _ = draw(HEADS)
    rows = row_keys(1, torch.tensor(3), torch.tensor([10, 11]), torch.arange(LENGTH))
    mask, core, part = AttentionMask(dropout_keys=rows), CoreAttention(0.5, "s"), CoreAttention(0.5, "s")
    whole = core(q, k, v, mask)
    part.first_head = 2
    torch.testing.assert_close(part(q[:, 2:], k[:, 2:], v[:, 2:], mask), whole[:, 2:], rtol=1e-12, atol=1e-12)
    one = q[:, :1].expand_as(q), k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    same = core(*one, mask)
    assert not torch.allclose(same[:, 0], same[:, 1])


def test_self_attention_is_the_sum_of_its_parts() -> None:
    """Projections, rotation, core and output with explicit matrices."""
    torch.manual_seed(0)
    module = SelfAttention(12, 4, 2, 6, bias=True, qkv_bias=True, core=CoreAttention(0.0, "s")).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q = (x @ module.q.weight.T + module.q.bias).view(2, 5, 4, 6).permute(0, 2, 1, 3)
    k = (x @ module.k.weight.T + module.k.bias).view(2, 5, 2, 6).permute(0, 2, 1, 3)
    v = (x @ module.v.weight.T + module.v.bias).view(2, 5, 2, 6).permute(0, 2, 1, 3)
    expected = (
        reference(q, k, v, AttentionMask()).permute(0, 2, 1, 3).reshape(2, 5, 24) @ module.out.weight.T
        + module.out.bias
    )
    torch.testing.assert_close(module(x, AttentionMask(), None), expected)
    rotary = rotary_table(torch.arange(5).expand(2, 5), 6, base=10000.0)
    shifted = rotary_table(torch.arange(5).expand(2, 5) + 100, 6, base=10000.0)
    turned = module(x, AttentionMask(), rotary)
    assert not torch.allclose(turned, expected)
    # Only distances matter
    torch.testing.assert_close(turned, module(x, AttentionMask(), shifted), rtol=1e-4, atol=1e-5)
    assert {name for name, _ in module.named_parameters()} == {
        f"{p}.{w}" for p in ("q", "k", "v", "out") for w in ("weight", "bias")
    }


@pytest.mark.parametrize("bias, qkv_bias", [(False, False), (False, True), (True, True)])
def test_biases_are_where_they_should_be(bias: bool, qkv_bias: bool) -> None:
    module = SelfAttention(8, 2, 1, 4, bias=bias, qkv_bias=qkv_bias, core=CoreAttention(0.0, "s"), head_norm=1e-6)
    assert (module.out.bias is not None) == bias
    assert all((layer.bias is not None) == qkv_bias for layer in (module.q, module.k, module.v))
    assert module.q_norm.weight.shape == (4,) and module.q_norm.eps == 1e-6


@pytest.mark.parametrize("causal", [True, False])
def test_relative_bias_on_every_path(causal: bool) -> None:
    """Blocks of queries, FlexAttention (on the CPU without a backward pass), explicit; the gradient of the table."""
    q, k, v, upstream = draw(2)
    table = torch.randn(HEADS, 2 * LENGTH - 1, dtype=torch.float64, requires_grad=True)
    found = {}
    for backend in ("auto", "explicit", "flex"):
        core = CoreAttention(0.0, "here", backend, scale=0.7).eval()
        leaves = [each.clone().requires_grad_(backend != "flex") for each in (q, k, v)]
        mask = AttentionMask(causal=causal, relative=table if backend != "flex" else table.detach())
        out = core(*leaves, mask)
        gradients = torch.autograd.grad((out * upstream).sum(), [*leaves, table]) if backend != "flex" else ()
        found[backend] = (out.detach(), *gradients)
    for one, other in zip(found["auto"], found["explicit"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["flex"][0], found["explicit"][0], rtol=1e-5, atol=1e-5)


def test_cross_attention_of_one_place_is_its_value() -> None:
    attention = CrossAttention(8, 2, 1, 4, bias=True, qkv_bias=True, core=CoreAttention(0.0, "here"))
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    seen = AttentionMask(causal=False, padding=torch.tensor([[True, False, False], [False, True, False]]))
    value = attention.v(memory[torch.arange(2), torch.arange(2)])
    torch.testing.assert_close(attention(x, memory, seen), attention.out(value.repeat(1, 2))[:, None].expand(-1, 5, -1))
