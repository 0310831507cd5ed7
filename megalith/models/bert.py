"""BERT: a bidirectional encoder that learns from masked words and from the order of two segments.

Megatron's form has a norm before each branch and one at the end (Shoeybi et al., 2019, section 4.2); Google's has one
after each residual and after the embeddings (Devlin et al., 2019).
Shapes: b batch, s sequence, h hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.config.parameters import initial
from megalith.config.sections.model import ModelConfig
from megalith.layers.block import run_in_order
from megalith.layers.dropout import Dropout
from megalith.layers.loss import TokenLoss
from megalith.layers.mask import AttentionMask
from megalith.layers.mlp import ACTIVATIONS
from megalith.layers.norm import NORMS
from megalith.models.components import build_dropout_keys, make_layer


class Embeddings(nn.Module):
    """Word, position and type embeddings with norm and dropout."""

    def __init__(self, config: ModelConfig):
        """config.vocab_size must be known. Parameters are left as torch draws them."""
        super().__init__()
        self.config = config
        h, vocab = config.hidden_size, config.vocab_size
        self.embedding = nn.Embedding(vocab, h)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, h)
        self.token_type_embedding = None if config.bert_no_binary_head else nn.Embedding(2, h)
        self.embedding_norm = self.make_norm() if config.norm_after_residual else None
        self.embedding_dropout = Dropout(config.hidden_dropout, "embedding")

    def make_norm(self) -> nn.Module:
        """A norm of the residual stream."""
        return NORMS[self.config.norm](self.config.hidden_size, self.config.layernorm_epsilon)

    def embed(self, ids: Tensor, positions: Tensor, token_types: Tensor | None, dropout_keys: Tensor | None) -> Tensor:
        """ids, positions, token_types (default: 0), dropout_keys [b, s] -> [b, s, h]."""
        x = self.embedding(ids) + self.position_embedding(positions)
        if self.token_type_embedding is not None:
            x = x + self.token_type_embedding(torch.zeros_like(ids) if token_types is None else token_types)
        return self.embedding_dropout(x if self.embedding_norm is None else self.embedding_norm(x), dropout_keys)


class Encoder(Embeddings):
    """The same in every BERT: embeddings, layers, norm. On a pipeline stage some of them are None."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        """config.vocab_size must be known. `seed` keys the dropout masks. Parameters are left as torch draws them."""
        super().__init__(config)
        self.seed = seed
        self.layers = nn.ModuleDict({str(i): make_layer(config, i) for i in range(config.num_layers)})
        self.run_layers = run_in_order
        self.final_norm = None if config.norm_after_residual else self.make_norm()

    def restore(self) -> None:
        """Nothing is tied, and there are no buffers."""

    def initial(self, name: str) -> tuple[str, float]:
        """A parameter's initialization; see config/parameters.py: initial."""
        return initial(self.config, name)

    def encode(
        self, inputs: Tensor, positions: Tensor | None, token_types: Tensor | None, padding_mask: Tensor | None,
        dropout_keys: Tensor | None, coordinates: Tensor,
    ) -> Tensor:  # fmt: skip
        """Hidden states [b, s, h]. dropout_keys: [b, s]. For the others see BERT.forward."""
        if positions is None:
            positions = coordinates.expand(inputs.shape[0], -1)
        x = inputs if self.embedding is None else self.embed(inputs, positions, token_types, dropout_keys)
        padding = None if padding_mask is None else padding_mask.bool()
        mask = AttentionMask(causal=False, padding=padding, dropout_keys=dropout_keys)
        x = self.run_layers(list(self.layers.values()), x, mask, None, dropout_keys)
        return x if self.final_norm is None else self.final_norm(x)


class BERT(Encoder):
    """The encoder with a head over the vocabulary, and one over the first token."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        """As Encoder."""
        super().__init__(config, seed)
        h, binary = config.hidden_size, not config.bert_no_binary_head
        self.head_dense, self.head_norm = nn.Linear(h, h), self.make_norm()
        self.head = nn.Linear(h, config.vocab_size)
        self.token_loss = TokenLoss(config.loss_chunk_tokens, config.z_loss_coeff, sparse_labels=True)
        self.first_token = FirstToken()
        self.pooler = nn.Linear(h, h) if binary else None
        self.order_head = nn.Linear(h, 2) if binary else None
        self.restore()

    def restore(self) -> None:
        """Tie head and embedding where the config says so, which to_empty undoes."""
        if not self.config.untie_embeddings_and_output_weights and self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.weight

    def forward(
        self, inputs: Tensor, positions: Tensor | None = None, token_types: Tensor | None = None,
        padding_mask: Tensor | None = None, labels: Tensor | None = None, loss_weights: Tensor | None = None,
        sentence_order: Tensor | None = None, order_weights: Tensor | None = None, samples: Tensor | None = None,
        step: Tensor | None = None, coordinates: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """The forward pass.

        inputs: ids [b, s] int64, or hidden states [b, s, h] on a pipeline stage without the embedding.
        positions: [b, s], for the position embedding (default: coordinates).
        token_types: [b, s], 0 or 1 (default: 0).
        padding_mask: [b, s], not zero for tokens; the others are not attended to. It is of the whole sequence also
            where coordinates are a shard.
        labels, loss_weights: [b, s], see TokenLoss.
        sentence_order: [b], 0 or 1. order_weights: [b], factors of their losses.
        samples [b] (global sample numbers) and step []: key the dropout masks; needed in training mode with dropout.
        coordinates: [s], positions of these tokens in the whole sequence (default: 0 .. s-1).
        Returns hidden states on a stage without the head; else (tokens, order), or just tokens without the binary head.
        tokens: logits [b, s, V], or with labels float32 losses [b, s].
        order: logits [b, 2], or with sentence_order float32 losses [b]. It is of the first token, so with weights these
            losses are 0 where the sequence's first token is not among these tokens.
        """
        if coordinates is None:
            coordinates = torch.arange(inputs.shape[1], device=inputs.device)
        dropout_keys = build_dropout_keys(self, samples, step, coordinates)
        x = self.encode(inputs, positions, token_types, padding_mask, dropout_keys, coordinates)
        if self.head is None:
            return x
        tokens = self.tokens(x, labels, loss_weights)
        if self.order_head is None:
            return tokens
        order = self.order_head(torch.tanh(self.pooler(self.first_token(x))))
        if sentence_order is None:
            return tokens, order
        return tokens, sequence_loss(order, sentence_order, order_weights, coordinates)

    def tokens(self, x: Tensor, labels: Tensor | None, loss_weights: Tensor | None) -> Tensor:
        """The head over the vocabulary: [b, s, h] -> logits [b, s, V], or losses [b, s]."""
        x = self.head_norm(ACTIVATIONS[self.config.head_activation](self.head_dense(x)))
        if labels is None:
            return self.head(x)
        return self.token_loss(x, self.head.weight, labels, loss_weights, self.head.bias)


class FirstToken(nn.Module):
    """The hidden state of the first token. It is a module, so that a plan can broadcast it from the first rank."""

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, h] -> [b, h]."""
        return x[:, 0]


def sequence_loss(logits: Tensor, labels: Tensor, weights: Tensor | None, coordinates: Tensor) -> Tensor:
    """Cross entropy [b] of logits [b, classes] of the first tokens, times `weights` [b].

    The weights apply where `coordinates` [s] begin with position 0: only there the first token is the sequence's.
    """
    losses = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")
    return losses if weights is None else losses * (weights * (coordinates[0] == 0))
