"""Attention between the chunks of a text and the neighbours that were retrieved for them.

Retro: Borgeaud et al., 2022, arXiv 2112.04426, section 2.4 and algorithm 1. Shapes: b texts, s tokens of a text,
l = floor(s / m) whole chunks of it, m tokens of a chunk, k neighbours of a chunk, r tokens of a neighbour, h hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.layers.attention import CrossAttention
from megalith.layers.cache import Cache, NeighborCache
from megalith.layers.mask import AttentionMask


def shift(x: Tensor, chunk_length: int) -> Tensor:
    """The tokens that attend to each chunk's neighbours, [b, s, ...] -> [b l, m, ...].

    They are the last token of the chunk, and the m - 1 tokens after it: what a token is told must not come from tokens
    behind it, and a chunk's neighbours come from all of its tokens. Behind the text's end there are zeros.
    """
    chunks = x.shape[1] // chunk_length
    x = x[:, chunk_length - 1 :]
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, chunks * chunk_length - x.shape[1]))
    return x.reshape(-1, chunk_length, *x.shape[2:])


def unshift(x: Tensor, batch: int, length: int) -> Tensor:
    """The reverse of `shift`: [b l, m, c] -> [b, s, c], zeros for the tokens before the first chunk's last."""
    return F.pad(x.reshape(batch, -1, x.shape[-1]), (0, 0, x.shape[1] - 1, 0))[:, :length]


class ChunkedCrossAttention(CrossAttention):
    """Tokens attend to all neighbours of one chunk, as `shift` says, at once: one softmax over k r keys.

    A token that sees no neighbour, as none was found, or as it is before the last token of the first chunk, gets
    exactly 0. (So `out` has no bias.)
    """

    def __init__(self, *sizes: int, chunk_length: int, **options: Any):
        """sizes, options: those of CrossAttention. chunk_length: the m above."""
        super().__init__(*sizes, **options)
        self.chunk_length = chunk_length

    def forward(  # type: ignore[override]
        self, x: Tensor, memory: Tensor | NeighborCache | None, mask: AttentionMask | None, cache: Cache | None = None
    ) -> Tensor:  # fmt: skip
        """x [b, s, h], memory [b l k, r, h] (None: no neighbours) -> [b, s, h].

        mask: its `padding` is [b l, k r], its `dropout_keys` are those of the shifted queries, [b l, m].
        """
        if memory is None:
            return torch.zeros_like(x)
        (q,) = self.shared_input(x, self.q)
        if not isinstance(memory, Tensor):
            return self.out(memory.attend(self, q))
        k, v = self.keys_values(memory, len(mask.padding))
        y = self.core(self.heads(shift(q, self.chunk_length)), k, v, mask)
        return self.out(unshift(y.transpose(1, 2).flatten(2), *q.shape[:2]))

    def keys_values(self, memory: Tensor, chunks: int) -> tuple[Tensor, ...]:
        """Keys and values of the neighbours of b l = `chunks` chunks, each [b l, heads, k r, d]."""
        parts = self.memory_input(memory, self.k, self.v)
        return tuple(self.heads(part.reshape(chunks, -1, part.shape[-1])) for part in parts)


class NeighborCrossAttention(CrossAttention):
    """The tokens of a neighbour attend to the chunk that it was retrieved for."""

    def __init__(self, *sizes: int, chunk_length: int, **options: Any):
        """As ChunkedCrossAttention."""
        super().__init__(*sizes, **options)
        self.chunk_length = chunk_length

    def forward(  # type: ignore[override]
        self, x: Tensor, memory: Tensor, mask: AttentionMask, cache: Cache | None = None
    ) -> Tensor:  # fmt: skip
        """x [b l k, r, h], memory [b, s, h]: the text's hidden states -> [b l k, r, h]."""
        (q,), m = self.shared_input(x, self.q), self.chunk_length
        k, v = self.memory_input(memory, self.k, self.v)
        k, v = (y[:, : y.shape[1] // m * m].reshape(-1, m, y.shape[-1]) for y in (k, v))
        y = self.core(*map(self.heads, (q.reshape(len(k), -1, q.shape[-1]), k, v)), mask)
        return self.out(y.transpose(1, 2).reshape(q.shape))


class Neighbors(NamedTuple):
    """Embedded neighbours, with what the encoder needs of them.

    hidden: [b l k, r, h]. mask: of their tokens. rotary: table of their positions. dropout_keys: [b l k, r].
    chunk_mask: for the attention to chunks.
    """

    hidden: Tensor
    mask: AttentionMask
    rotary: tuple[Tensor, Tensor] | None
    dropout_keys: Tensor | None
    chunk_mask: AttentionMask


class NeighborEncoder(nn.Module):
    """A bidirectional transformer over each neighbour, some of whose layers attend to the neighbour's chunk."""

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module):
        super().__init__()
        self.layers = nn.ModuleDict({str(number): layer for number, layer in enumerate(layers)})
        self.norm = norm

    def forward(self, neighbors: Neighbors | NeighborCache, text: Tensor) -> Tensor | NeighborCache:
        """text [b, s, h]: hidden states of the texts -> [b l k, r, h]."""
        if not isinstance(neighbors, Neighbors):
            return neighbors.encode(self, text)
        x, mask, rotary, dropout_keys, chunk_mask = neighbors
        for layer in self.layers.values():
            x = layer(x, mask, rotary, dropout_keys, text, chunk_mask)
        return self.norm(x)
