"""Runners that retrieve (rows.py), in place of generation/runner.py's and generation/parallel/runner.py's."""

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


class Retrieving(ModelRunner):
    """Before the runner that it is mixed into. Prompts are read one after the other, and what rows hold of them is not
    shared. Every process of a model asks its own retriever, which must find the same on all of them.
    """

    def __init__(self, model: Any, cache: KVCache, retriever: Retriever, stages: Sequence[nn.Module]):
        """model: what the other runner takes. stages: of this process."""
        super().__init__(model, cache, batch_invariant=False)
        self.retriever, self.rows = retriever, [RetrievedRow() for _ in range(cache.rows)]
        encoding = str(stages[0].config.retrieval_layers[0])
        # the stage that embeds neighbours, where this process has it
        self.embedder = next((stage for stage in stages if encoding in stage.layers), stages[0])

    def prefill(self, chunks: Sequence[PrefillChunk]) -> Tensor | None:
        """See ModelRunner."""
        found = []
        for chunk in chunks:
            if not chunk.start:
                self.rows[chunk.row] = RetrievedRow()
            self.begin([chunk.row], [chunk.ids])
            found.append(super().prefill([chunk]))
        return None if found[0] is None else torch.cat(found)

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
            [RowCall(self.embedder, self.retriever, self.rows[row], each, device) for row, each in zip(rows, ids)]
        )

    def forward(self, inputs: Tensor | None, **arguments: Any) -> Tensor | None:
        """See ModelRunner."""
        arguments["cache"].neighbors = self.call
        # the ids have the shape of what pipeline stages send on
        return super().forward(inputs, neighbor_tokens=self.call.tokens, **arguments)


class RetrievalRunner(Retrieving, ModelRunner):
    """Of a model in one process."""
