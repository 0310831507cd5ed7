"""Retro: a GPT that reads passages which are retrieved for each chunk of its text.

Borgeaud et al., 2022, arXiv 2112.04426, section 2.4 and algorithm 1. Some layers attend to neighbours
(layers/chunked_attention.py). The first of them holds the encoder of the neighbours, which itself attends to the hidden
states of that layer; the others read its output. Megatron's choices: neighbours are embedded as the text is; the first
layer of the encoder alone attends to the text; keys of cross attention have no positions.
Shapes: b batch, s sequence, l = floor(s / m) whole chunks of m tokens, k neighbours of a chunk, r tokens of a
neighbour, h hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalith.config.sections.model import ModelConfig
from megalith.layers.cache import Cache
from megalith.layers.chunked_attention import Neighbors, shift
from megalith.layers.dropout import Dropout
from megalith.layers.mask import AttentionMask
from megalith.models.components import build_dropout_keys
from megalith.models.gpt import GPT


class Retro(GPT):
    """A GPT some of whose layers attend to neighbours; without neighbours it computes what that GPT would."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        """As GPT."""
        super().__init__(config, seed)
        self.neighbor_dropout = Dropout(config.hidden_dropout, "neighbors.embedding")

    def forward(  # type: ignore[override]
        self, inputs: Tensor, neighbors: Tensor | None = None, *, neighbor_tokens: Tensor | None = None,
        neighbor_mask: Tensor | None = None, positions: Tensor | None = None, labels: Tensor | None = None,
        loss_weights: Tensor | None = None, samples: Tensor | None = None, step: Tensor | None = None,
        coordinates: Tensor | None = None, cache: Cache | None = None, logits_to_keep: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """The forward pass; arguments that are not explained here are as GPT's.

        neighbors: [b, l, k, r, h], the encoder's output, on a pipeline stage after the one that has the encoder.
        cache: its `neighbors`, if any, stand for neighbor_mask, and for neighbor_tokens on a single pipeline stage.
        neighbor_tokens: ids [b, l, k, r] int64 of the neighbours of each chunk; None: no chunk has any.
        neighbor_mask: [b, l, k, r], not zero for tokens, zero for padding and for a neighbour that is missing.
        Returns losses, or logits; on a stage without the head the hidden states, and the encoder's output where later
        stages need it.
        """
        x, *of_layers = self.start(inputs, positions, None, samples, step, coordinates, cache, padding_mask)
        first, last = self.config.retrieval_layers[0], self.config.retrieval_layers[-1]
        numbers = [int(number) for number in self.layers]
        before, encoding, after = (
            [self.layers[str(number)] for number in numbers if sign == (number > first) - (number < first)]
            for sign in (-1, 0, 1)
        )
        memory: Any = None if cache is None else cache.neighbors
        memory_mask = None
        if memory is not None:
            if neighbors is not None:
                memory.receive(neighbors.flatten(0, 2))
        elif neighbor_tokens is not None and neighbor_tokens.numel():  # a text may be shorter than a chunk
            padding, dropout_keys = neighbor_mask.bool(), of_layers[-1]
            if dropout_keys is not None:
                dropout_keys = shift(dropout_keys, self.config.retro_gpt_chunk_length)
            memory_mask = AttentionMask(
                causal=False, padding=padding.flatten(2).flatten(0, 1), dropout_keys=dropout_keys
            )
            if encoding:
                memory = self.enter(neighbor_tokens, padding, samples, step)
            elif neighbors is not None:
                memory = neighbors.flatten(0, 2)
        x = self.run_layers(before, x, *of_layers, None, None, cache)
        if encoding:
            x, memory = self.run_layers(encoding, x, *of_layers, memory, memory_mask, cache)
        x = self.run_layers(after, x, *of_layers, memory, memory_mask, cache)
        if neighbor_tokens is None or memory is None or not first < numbers[-1] + 1 <= last:
            return self.finish(x, labels, loss_weights, logits_to_keep)
        memory = memory if isinstance(memory, Tensor) else memory.encoded()
        # a clone where it was received, because fully_shard hooks outputs, which must not be views of inputs
        memory = memory if encoding else memory.clone()
        return x, memory.view(*neighbor_tokens.shape[:3], *memory.shape[1:])

    def enter(self, ids: Tensor, padding: Tensor, samples: Tensor | None, step: Tensor | None) -> Neighbors:
        """What the encoder takes: embedded neighbours with their masks. ids, padding: [b, l, k, r]."""
        batch, chunks, count, length = ids.shape
        positions = torch.arange(length, device=ids.device).expand(batch * chunks * count, -1)
        coordinates = torch.arange(chunks * count * length, device=ids.device)  # each token has masks of its own
        keys = chunk_keys = build_dropout_keys(self, samples, step, coordinates)
        if keys is not None:
            keys, chunk_keys = keys.view(-1, length), keys.view(batch * chunks, count * length)
        x = self.neighbor_dropout(self.embed_tokens(ids.flatten(0, 2), positions), keys)
        mask = AttentionMask(causal=False, padding=padding.flatten(0, 2), dropout_keys=keys)
        chunk_mask = AttentionMask(causal=False, dropout_keys=chunk_keys)
        return Neighbors(x, mask, self.rotary(positions), keys, chunk_mask)
