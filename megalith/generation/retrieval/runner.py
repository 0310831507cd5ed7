"""A runner that retrieves (rows.py), in place of generation/runner.py's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megalith.generation.cache import KVCache
from megalith.generation.cached_attention import PrefillChunk
from megalith.generation.model import Retriever
from megalith.generation.retrieval.rows import CallNeighbors, RetrievedRow, RowCall
from megalith.generation.runner import ModelRunner


class RetrievalRunner(ModelRunner):
    """A runner that retrieves. Prompts are read one after the other, and what rows hold of them is not shared."""

    def __init__(self, model: nn.Module, cache: KVCache, retriever: Retriever):
        super().__init__(model, cache, batch_invariant=False)
        self.retriever, self.rows = retriever, [RetrievedRow() for _ in range(cache.rows)]

    def prefill(self, chunks: Sequence[PrefillChunk]) -> Tensor:
        """See ModelRunner."""
        found = []
        for chunk in chunks:
            if not chunk.start:
                self.rows[chunk.row] = RetrievedRow()
            self.begin([chunk.row], [chunk.ids])
            found.append(super().prefill([chunk]))
        return torch.cat(found)

    def decode(
        self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int], source_lengths: Sequence[int] = ()
    ) -> Tensor | None:  # fmt: skip
        """See ModelRunner."""
        self.begin(rows, [[token] for token in tokens])
        return super().decode(rows, tokens, positions, source_lengths)

    def begin(self, rows: Sequence[int], ids: Sequence[Sequence[int]]) -> None:
        """Look up the neighbours for a call of the model that reads these tokens of these rows."""
        device = self.cache.device
        self.call = CallNeighbors(
            [RowCall(self.model, self.retriever, self.rows[row], each, device) for row, each in zip(rows, ids)]
        )

    def forward(self, inputs: Tensor | None, **arguments: Any) -> Tensor | None:
        """See ModelRunner."""
        arguments["cache"].neighbors = self.call
        return super().forward(inputs, **arguments)
