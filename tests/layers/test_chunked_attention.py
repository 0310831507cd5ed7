"""Attention between chunks and their neighbours, against loops written from the paper (arXiv 2112.04426, 2.4)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from megalith.layers.attention import CoreAttention
from megalith.layers.chunked_attention import ChunkedCrossAttention, NeighborCrossAttention, shift, unshift
from megalith.layers.mask import AttentionMask

H, HEADS, KV_HEADS, D, M, K, R = 12, 4, 2, 3, 4, 2, 6


def made(kind: type, backend: str = "auto") -> nn.Module:
    torch.manual_seed(0)
    core = CoreAttention(0.0, "site", backend)
    return kind(H, HEADS, KV_HEADS, D, bias=False, qkv_bias=True, core=core, chunk_length=M).double()


def attend(module: nn.Module, token: Tensor, memory: Tensor) -> Tensor:
    """CA(h, Y) of one token [h] and the visible rows of Y [t, h], head by head; 0 where there are none."""
    q, k, v = module.q(token), module.k(memory), module.v(memory)
    heads = []
    for head in range(HEADS):
        own, shared = slice(head * D, (head + 1) * D), head * KV_HEADS // HEADS
        theirs = slice(shared * D, (shared + 1) * D)
        scores = k[:, theirs] @ q[own] / D**0.5
        heads.append(scores.softmax(0) @ v[:, theirs] if len(memory) else torch.zeros(D, dtype=token.dtype))
    return torch.cat(heads) @ module.out.weight.T


def by_loop(module: nn.Module, x: Tensor, neighbors: Tensor, mask: Tensor) -> Tensor:
    """CCA: token i (from 1) of chunk u + 1 attends to all of chunk u's neighbours, i < m, and chunk u's last one too.

    neighbors [b, l, k, r, h], mask [b, l, k, r].
    """
    rows = []
    for sample in range(len(x)):
        tokens = []
        for position in range(1, x.shape[1] + 1):  # as the paper counts: u m + i - 1 for i = 1 ... m
            u = position // M
            if u == 0:
                tokens.append(torch.zeros(H, dtype=x.dtype))
                continue
            visible = neighbors[sample, u - 1][mask[sample, u - 1]]
            tokens.append(attend(module, x[sample, position - 1], visible))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def random_inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    chunks = length // M
    x = torch.randn(3, length, H, generator=generator, dtype=torch.float64, requires_grad=True)
    neighbors = torch.randn(3, chunks, K, R, H, generator=generator, dtype=torch.float64, requires_grad=True)
    lengths = torch.randint(-1, R + 1, (3, chunks, K), generator=generator)
    lengths[1, 0] = 0  # a chunk without neighbours
    return x, neighbors, torch.arange(R) < lengths[..., None]


def gradients(output: Tensor, module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return list(torch.autograd.grad((output * weights).sum(), (*inputs, *module.parameters())))


@pytest.mark.parametrize("length", [M, 4 * M, 3 * M + 1, 4 * M - 1])
@pytest.mark.parametrize("backend", ["auto", "explicit"])
def test_chunked_cross_attention_is_the_loop_of_the_paper(length, backend):
    module, (x, neighbors, mask) = made(ChunkedCrossAttention, backend), random_inputs(length)
    found = module(x, neighbors.flatten(0, 2), AttentionMask(causal=False, padding=mask.flatten(2).flatten(0, 1)))
    expected = by_loop(module, x, neighbors, mask)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(found, module, x, neighbors), gradients(expected, module, x, neighbors)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert not found[:, : M - 1].any()
    assert not found[1, M - 1 : 2 * M - 1].any(), "a chunk without a neighbour gets exactly 0"


def test_tokens_of_a_neighbor_attend_to_its_chunk():
    module, (text, neighbors, _) = made(NeighborCrossAttention), random_inputs(3 * M + 2)
    found = module(neighbors.flatten(0, 2), text, AttentionMask(causal=False))
    expected = torch.stack([
        torch.stack([attend(module, token, text[sample, u * M : (u + 1) * M]) for token in neighbors[sample, u, j]])
        for sample in range(3) for u in range(3) for j in range(K)
    ])  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(found, module, text, neighbors), gradients(expected, module, text, neighbors)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@given(st.integers(1, 7), st.integers(0, 5), st.integers(0, 6), st.integers(1, 3))
def test_shift_gives_each_chunk_its_last_token_and_those_after_it(chunk, chunks, rest, batch):
    length = chunk * chunks + rest % chunk
    x = torch.arange(batch * length).view(batch, length) + 1
    shifted = shift(x, chunk)
    assert shifted.shape == (batch * chunks, chunk)
    for sample in range(batch):
        for u in range(chunks):
            expected = [x[sample, p].item() if (p := (u + 1) * chunk - 1 + i) < length else 0 for i in range(chunk)]
            assert shifted[sample * chunks + u].tolist() == expected
    if chunks:
        back = unshift(shifted[..., None], batch, length)[..., 0]
        assert torch.equal(back, x.where(torch.arange(length) >= chunk - 1, 0))
