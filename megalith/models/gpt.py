"""GPT: a decoder-only transformer, in all the forms that Megatron, GPT-2 and Llama give it.

Shapes: b batch, s sequence, h hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalith.config.parameters import initial
from megalith.config.sections.model import ModelConfig
from megalith.layers.block import run_in_order
from megalith.layers.cache import Cache
from megalith.layers.dropout import Dropout
from megalith.layers.loss import TokenLoss
from megalith.layers.mask import AttentionMask
from megalith.layers.norm import NORMS
from megalith.layers.positions import RopeScaling, alibi_slopes, rotary_table
from megalith.models.components import build_dropout_keys, make_layer


class GPT(nn.Module):
    """Embedding, layers, final norm, head. On a pipeline stage any of them may be None."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        """config.vocab_size must be known. `seed` keys the dropout masks. Parameters are left as torch draws them."""
        super().__init__()
        self.config, self.seed = config, seed
        h, vocab = config.hidden_size, config.vocab_size
        self.embedding = nn.Embedding(vocab, h)
        learned = config.positions == "learned_absolute"
        self.position_embedding = nn.Embedding(config.max_position_embeddings, h) if learned else None
        self.embedding_norm = NORMS[config.norm](h, config.layernorm_epsilon) if config.embed_layernorm else None
        self.embedding_dropout = Dropout(config.hidden_dropout, "embedding")
        self.layers = nn.ModuleDict({str(i): make_layer(config, i) for i in range(config.num_layers)})
        self.run_layers = run_in_order
        self.final_norm = NORMS[config.norm](h, config.layernorm_epsilon)
        self.head = nn.Linear(h, vocab, bias=False)
        self.token_loss = TokenLoss(config.loss_chunk_tokens, config.z_loss_coeff)
        self.rope_scaling = rope_scaling(config)
        self.slopes: Tensor | None
        self.register_buffer("slopes", self.make_slopes() if config.positions == "alibi" else None, persistent=False)
        self.restore()

    def make_slopes(self) -> Tensor:
        """ALiBi's slope of each head, float32 [heads]."""
        slopes = alibi_slopes(self.config.num_attention_heads)
        return slopes * self.config.head_dim**-0.5 if self.config.scaled_alibi else slopes

    def restore(self) -> None:
        """Tie head and embedding where the config says so, and fill buffers: what to_empty undoes."""
        if not self.config.untie_embeddings_and_output_weights and self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.weight
        if self.slopes is not None and not self.slopes.is_meta:
            self.slopes.copy_(self.make_slopes())

    def initial(self, name: str) -> tuple[str, float]:
        """A parameter's initialization; see config/parameters.py: initial."""
        return initial(self.config, name)

    def forward(
        self, inputs: Tensor, positions: Tensor | None = None, documents: Tensor | None = None,
        labels: Tensor | None = None, loss_weights: Tensor | None = None, samples: Tensor | None = None,
        step: Tensor | None = None, coordinates: Tensor | None = None, cache: Cache | None = None,
        logits_to_keep: Tensor | None = None, padding_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The forward pass.

        inputs: ids [b, s] int64, or hidden states [b, s, h] on a pipeline stage without the embedding.
        positions: [b, s], for the position embedding (default: coordinates).
        documents: int [b, s]; tokens attend only to their own document. They are of the whole sequence also where
            coordinates are a shard.
        labels, loss_weights: [b, s], see TokenLoss; with labels the result is float32 losses [b, s].
        samples [b] (global sample numbers) and step []: key the dropout masks; needed in training mode with dropout.
        coordinates: [s], positions of these tokens in the whole sequence (default: 0 .. s-1).
        cache: keys and values of earlier calls (layers/cache.py). It has the positions, and takes the keys and values
            of these tokens.
        logits_to_keep: int64 [n], positions of the s whose logits are computed, [b, n, V] (default: all; those of a
            long prompt are large).
        padding_mask: [b, s], not zero for tokens; the others are not attended to, and do not change positions. It is of
            the whole sequence also where coordinates are a shard. Padding after the tokens needs none, as a token sees
            only those before it.
        Returns losses, or logits [b, s, V], or hidden states on a stage without the head.
        """
        x, *of_layers = self.start(inputs, positions, documents, samples, step, coordinates, cache, padding_mask)
        x = self.run_layers(list(self.layers.values()), x, *of_layers, None, None, cache)
        return self.finish(x, labels, loss_weights, logits_to_keep)

    def start(
        self, inputs: Tensor, positions: Tensor | None, documents: Tensor | None, samples: Tensor | None,
        step: Tensor | None, coordinates: Tensor | None, cache: Cache | None, padding_mask: Tensor | None,
    ) -> tuple[Tensor, AttentionMask, tuple[Tensor, Tensor] | None, Tensor | None]:  # fmt: skip
        """(hidden states of the first layer, mask, rotary table, dropout keys), of the arguments of `forward`."""
        if coordinates is None:
            coordinates = torch.arange(inputs.shape[1], device=inputs.device)
        if positions is None:
            positions = coordinates.expand(inputs.shape[0], -1) if cache is None else cache.positions
        dropout_keys = build_dropout_keys(self, samples, step, coordinates)
        x = inputs if inputs.is_floating_point() else self.embed(inputs, positions, dropout_keys)
        padding = None if padding_mask is None else padding_mask.bool()
        mask = AttentionMask(documents=documents, padding=padding, slopes=self.slopes, dropout_keys=dropout_keys)
        return x, mask, self.rotary(positions), dropout_keys

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """The rotary table of positions [b, s], where the config has one."""
        c = self.config
        if c.positions != "rope":
            return None
        return rotary_table(
            positions, c.head_dim, base=c.rotary_base, percent=c.rotary_percent, rope_scaling=self.rope_scaling
        )

    def finish(
        self, x: Tensor, labels: Tensor | None, loss_weights: Tensor | None, logits_to_keep: Tensor | None
    ) -> Tensor:  # fmt: skip
        """What `forward` returns, of the last layer's hidden states."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.head is None:
            return x
        if labels is None:
            return self.head(x if logits_to_keep is None else x[:, logits_to_keep])
        return self.token_loss(x, self.head.weight, labels, loss_weights)

    def embed(self, ids: Tensor, positions: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """Word and position embeddings with dropout: [b, s] -> [b, s, h]."""
        return self.embedding_dropout(self.embed_tokens(ids, positions), dropout_keys)

    def embed_tokens(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Word and position embeddings: [b, s] -> [b, s, h]."""
        x = self.embedding(ids)
        if self.config.scale_embeddings:
            x = x * self.config.hidden_size**0.5
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        return x if self.embedding_norm is None else self.embedding_norm(x)


def rope_scaling(config: ModelConfig) -> RopeScaling | None:
    """The config's scaling of the rotary embedding, None where it has none."""
    c, kind = config, config.rope_scaling_type
    if kind is None:
        return None
    slow, fast = c.rope_beta_slow, c.rope_beta_fast
    if kind == "llama3":
        slow, fast = c.rope_low_freq_factor, c.rope_high_freq_factor
    return RopeScaling(kind, c.rope_scaling_factor, c.rope_original_max_position_embeddings, slow, fast)
