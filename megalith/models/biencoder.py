"""A bi-encoder: one BERT reads questions, another one passages, and their vectors' dot product says what fits.

The model of the inverse cloze task (Lee et al., 2019, arXiv 1906.00300, section 4) and of dense passage retrieval
(Karpukhin et al., 2020, arXiv 2004.04906), as Megatron's BiEncoderModel: the vector of a text is the last hidden state
of its first token, through a linear projection where there is one. Megatron's names are kept: queries and contexts.
Shapes: b batch, c contexts of a query, s sequence of a query, t of a context, h hidden, p width of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalith.config.parameters import initial
from megalith.config.sections.model import ModelConfig
from megalith.layers.block import run_in_order
from megalith.layers.mask import AttentionMask
from megalith.layers.norm import NORMS
from megalith.models.bert import Embeddings, FirstToken
from megalith.models.components import build_dropout_keys, make_layer

Pair = tuple[Tensor | None, Tensor | None]  # of the queries and of the contexts; None where a call has none of them


class BiEncoder(nn.Module):
    """Two towers, of which `layers` hold a layer each, so that a pipeline cuts both alike.

    With --biencoder-shared-query-context-model there is the query's tower alone, and contexts pass through it too. On a
    pipeline stage embeddings and projections may be None, and layers may be missing.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        """config.vocab_size must be known. `seed` keys the dropout masks. Parameters are left as torch draws them."""
        super().__init__()
        self.config, self.seed = config, seed
        shared = config.biencoder_shared_query_context_model
        self.query_embeddings = Embeddings(config)
        self.context_embeddings = None if shared else Embeddings(config)
        self.layers = nn.ModuleDict({str(i): TwoLayers(config, i) for i in range(config.num_layers)})
        self.run_layers = run_in_order
        self.query_head = Projection(config)
        self.context_head = None if shared else Projection(config)

    def restore(self) -> None:
        """Nothing is tied, and there are no buffers."""

    def initial(self, name: str) -> tuple[str, float]:
        """A parameter's initialization; see config/parameters.py: initial."""
        return initial(self.config, name)

    def forward(
        self, inputs: Tensor | None, contexts: Tensor | None = None, *, context_ids: Tensor | None = None,
        padding_mask: Tensor | None = None, context_padding_mask: Tensor | None = None, samples: Tensor | None = None,
        step: Tensor | None = None, coordinates: Tensor | None = None, context_coordinates: Tensor | None = None,
    ) -> Pair | tuple[Tensor, ...]:  # fmt: skip
        """The forward pass.

        inputs: ids of queries [b, s] int64, or on a later pipeline stage their hidden states [b, s, h]; None without.
        contexts: hidden states [b, t, h] or [b, c, t, h], on a later stage.
        context_ids: ids of contexts, [b, t], or [b, c, t] with several for each query; None without.
        padding_mask [b, s], context_padding_mask: 1 for tokens, 0 for padding, of the whole sequences also where
            coordinates are a shard.
        samples [b] (global sample numbers) and step []: key the dropout masks, each text with masks of its own; needed
            in training mode with dropout.
        coordinates [s], context_coordinates [t]: positions of these tokens in the whole sequences.
        Returns the vectors, ([b, p], [b, p] or [b, c, p]), None for what is absent; on a stage without the
        projections the hidden states of what is there.
        """
        shape = None if context_ids is None else context_ids.shape[:-1]
        count = 1 if shape is None else shape[1:].numel()
        if contexts is None:
            contexts = context_ids
        if shape is not None:
            contexts = contexts.flatten(0, len(shape) - 1)
            if context_coordinates is None:
                context_coordinates = torch.arange(context_ids.shape[-1], device=context_ids.device)
            if context_padding_mask is not None:
                context_padding_mask = context_padding_mask.flatten(0, len(shape) - 1)
        if coordinates is None and inputs is not None:
            coordinates = torch.arange(inputs.shape[1], device=inputs.device)
        queries = contexts_of = None
        if samples is not None:  # a query and its contexts are texts of their own
            queries = samples * (count + 1)
            contexts_of = (queries[:, None] + 1 + torch.arange(count, device=samples.device)).flatten()
        shared = self.config.biencoder_shared_query_context_model
        towers = (
            (inputs, self.query_embeddings, padding_mask, queries, coordinates),
            (
                contexts, self.query_embeddings if shared else self.context_embeddings, context_padding_mask,
                contexts_of, context_coordinates,
            ),
        )  # fmt: skip
        streams = [self.enter(tower[0], *tower[1:], step) for tower in towers]
        x, masks, dropout_keys = zip(*streams)
        x = self.run_layers(list(self.layers.values()), x, masks, dropout_keys)
        if self.query_head is None:
            return tuple(part for part in (x[0], unflatten(x[1], shape)) if part is not None)
        heads = self.query_head, self.query_head if shared else self.context_head
        queries, contexts = (None if part is None else head(part) for head, part in zip(heads, x))
        return queries, unflatten(contexts, shape)

    def enter(
        self, x: Tensor | None, embeddings: Embeddings | None, padding_mask: Tensor | None, samples: Tensor | None,
        coordinates: Tensor | None, step: Tensor | None,
    ) -> tuple[Tensor | None, AttentionMask | None, Tensor | None]:  # fmt: skip
        """(hidden states, attention mask, dropout keys) of one tower's texts; x: ids, hidden states or None."""
        if x is None or coordinates is None:
            return None, None, None
        dropout_keys = build_dropout_keys(self, samples, step, coordinates)
        if embeddings is not None:
            x = embeddings.embed(x, coordinates.expand(x.shape[0], -1), None, dropout_keys)
        padding = None if padding_mask is None else padding_mask.bool()
        return x, AttentionMask(causal=False, padding=padding, dropout_keys=dropout_keys), dropout_keys


class TwoLayers(nn.Module):
    """A layer of the query's tower and one of the context's, or one for both. They do not meet.

    They are one module, because fully_shard gathers, and recomputation keeps, a module's parameters and inputs.
    """

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        self.query = make_layer(config, number)
        self.context = None if config.biencoder_shared_query_context_model else make_layer(config, number)

    def forward(self, x: Pair, masks: tuple, dropout_keys: Pair) -> Pair:
        """Hidden states of queries [b, s, h] and contexts [bc, t, h] -> the same."""
        layers = self.query, self.query if self.context is None else self.context
        parts = [
            None if part is None else layer(part, mask, None, keys)
            for layer, part, mask, keys in zip(layers, x, masks, dropout_keys)
        ]
        return parts[0], parts[1]


class Projection(nn.Module):
    """The end of a tower: final norm, first token, projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, norm = config.biencoder_projection_dim, NORMS[config.norm]
        self.final_norm = None if config.norm_after_residual else norm(config.hidden_size, config.layernorm_epsilon)
        self.first_token = FirstToken()
        self.projection = nn.Linear(config.hidden_size, width) if width else None

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [b, s, h] -> vectors [b, p]."""
        x = self.first_token(x if self.final_norm is None else self.final_norm(x))
        return x.clone() if self.projection is None else self.projection(x)


def unflatten(x: Tensor | None, shape: torch.Size | None) -> Tensor | None:
    """[b c, ...] -> [b, c, ...], or as it is where each query has one context. No view: fully_shard hooks outputs."""
    return x if x is None or shape is None or len(shape) == 1 else x.unflatten(0, shape).clone()
