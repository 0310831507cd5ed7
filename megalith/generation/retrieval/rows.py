"""Text of a Retro: neighbours of each chunk are looked up when its last token is read, and attended to from there on.

A retriever is any function from the ids of a chunk to the ids of its neighbours, each with what follows it, the nearest
first. `TextModel.retriever` holds it; without one the model reads no neighbours.

Shapes: n tokens of a row in this call, l chunks that end in it, m tokens of a chunk, k neighbours of r tokens,
h hidden, d channels of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megalith.generation.model import Retriever
from megalith.generation.retrieval.texts import retrieve
from megalith.layers.chunked_attention import ChunkedCrossAttention, NeighborEncoder
from megalith.layers.mask import AttentionMask


@dataclasses.dataclass
class RetrievedRow:
    """What the next call needs of a row of the cache.

    ids, hidden: of the chunk that has not ended, hidden states [1, tokens, h] of the layer with the encoder.
    padding, keys_values: of the neighbours of the last chunk that has ended, bool [1, k r], and by layer [1, heads,
    k r, d]; None and nothing before that.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    hidden: Tensor | None = None
    padding: Tensor | None = None
    keys_values: dict[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)


class RowCall:
    """One row in one call of the model: the neighbours of the chunks that end in it, and attention to these."""

    def __init__(self, model: Any, retriever: Retriever, row: RetrievedRow, ids: Sequence[int], device: torch.device):
        """ids: of the row's tokens in this call. Asks the retriever."""
        m = model.config.retro_gpt_chunk_length
        self.model, self.row, self.count, self.before = model, row, len(ids), len(row.ids)
        ids = [*row.ids, *ids]
        chunks = [ids[first : first + m] for first in range(0, len(ids) // m * m, m)]
        row.ids = ids[len(chunks) * m :]
        self.tokens, self.mask = (each[None].to(device) for each in retrieve(chunks, retriever, model.config))
        self.padding = [row.padding, *self.mask.flatten(2).transpose(0, 1)]  # before this call, and by chunk
        row.padding = self.padding[-1]
        self.memory: Tensor | None = None

    def encode(self, encoder: NeighborEncoder, text: Tensor) -> None:
        """text: [1, n, h], hidden states of this call."""
        text = text if self.row.hidden is None else torch.cat((self.row.hidden, text), dim=1)
        end = self.tokens.shape[1] * self.model.config.retro_gpt_chunk_length
        if end:
            self.memory = encoder(self.model.enter(self.tokens, self.mask, None, None), text[:, :end])
        self.row.hidden = text[:, end:]

    def attend(self, attention: ChunkedCrossAttention, q: Tensor) -> Tensor:
        """q [1, n, heads d] -> [1, n, heads d]: each token to the last chunk that has ended with it or before."""
        site, m = attention.core.site, attention.chunk_length
        keys_values = [self.row.keys_values.get(site)]
        if self.memory is not None:
            k, v = attention.keys_values(self.memory, self.tokens.shape[1])
            keys_values += zip(k.split(1), v.split(1))
        y = torch.zeros_like(q)
        for number, (pair, padding) in enumerate(zip(keys_values, self.padding, strict=True)):
            first = max(0, number * m - 1 - self.before) if number else 0
            stop = min(self.count, (number + 1) * m - 1 - self.before)
            if pair is not None and padding is not None and first < stop:
                part = attention.heads(q[:, first:stop])
                part = attention.core(part, *pair, AttentionMask(causal=False, padding=padding))
                y[:, first:stop] = part.transpose(1, 2).flatten(2)
        if keys_values[-1] is not None:
            self.row.keys_values[site] = keys_values[-1]
        return y


class CallNeighbors:
    """The rows of one call, for the model; see layers/cache.py."""

    def __init__(self, rows: Sequence[RowCall]):
        """rows: one whose tokens are read, or those that get a token each."""
        self.rows = rows

    def encode(self, encoder: NeighborEncoder, text: Tensor) -> CallNeighbors:
        """See layers/cache.py: text [rows, n, h]."""
        for row, part in zip(self.rows, text.split(1), strict=True):
            row.encode(encoder, part)
        return self

    @property
    def tokens(self) -> Tensor | None:
        """Ids [1, l, k, r] of the neighbours of all chunks that end in this call; None without any."""
        found = torch.cat([row.tokens for row in self.rows], dim=1)
        return found if found.shape[1] else None

    def encoded(self) -> Tensor:
        """See layers/cache.py."""
        return torch.cat([row.memory for row in self.rows if row.memory is not None])

    def receive(self, encoded: Tensor) -> None:
        """See layers/cache.py."""
        parts = encoded.split([row.tokens.shape[1] * row.tokens.shape[2] for row in self.rows])
        for row, part in zip(self.rows, parts, strict=True):
            row.memory = part if len(part) else None

    def attend(self, attention: ChunkedCrossAttention, q: Tensor) -> Tensor:
        """See layers/cache.py: q [rows, n, heads d]."""
        return torch.cat([row.attend(attention, part) for row, part in zip(self.rows, q.split(1), strict=True)])
