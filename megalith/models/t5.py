"""T5: an encoder, and a decoder that attends to its output. The config chooses one of two forms, or a mixture:

- Megatron's: learned absolute positions, LayerNorm, biases (of the output layer too), GELU, scores over sqrt(d).
- T5's own (Raffel et al., 2020, arXiv 1910.10683; v1.1, mT5 and Flan too): --position-embedding-type relative, RMSNorm,
  no biases, ReLU or gated GELU, --softmax-scale 1, and --scale-output where the output layer is tied to the embedding.

Dropout is where Megatron has it: after embeddings, on attention weights, and of each branch before its residual.
Shapes: b batch, s encoder's sequence, t decoder's sequence, h hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalith.config.parameters import initial, parameter_kind
from megalith.config.sections.model import ModelConfig
from megalith.layers.block import run_in_order
from megalith.layers.cache import Cache
from megalith.layers.dropout import Dropout
from megalith.layers.loss import TokenLoss
from megalith.layers.mask import AttentionMask
from megalith.layers.norm import NORMS
from megalith.layers.positions import RelativeBias
from megalith.models.components import build_dropout_keys, make_layer


class T5(nn.Module):
    """Embedding, encoder, decoder, head. `layers` are the encoder's and, numbered on, the decoder's.

    On a pipeline stage any of them may be None, and layers may be missing.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        """config.vocab_size must be known. `seed` keys the dropout masks. Parameters are left as torch draws them."""
        super().__init__()
        self.config, self.seed = config, seed
        h, vocab = config.hidden_size, config.vocab_size
        self.embedding = nn.Embedding(vocab, h)
        learned = config.positions == "learned_absolute"
        self.position_embedding = nn.Embedding(config.max_position_embeddings, h) if learned else None
        self.encoder_dropout = Dropout(config.hidden_dropout, "encoder.embedding")
        self.decoder_dropout = Dropout(config.hidden_dropout, "decoder.embedding")
        self.encoder_bias, self.decoder_bias = (self.make_bias(bidirectional) for bidirectional in (True, False))
        self.layers = nn.ModuleDict({str(i): make_layer(config, i) for i in range(config.all_layers)})
        self.run_layers = run_in_order
        self.encoder_norm = NORMS[config.norm](h, config.layernorm_epsilon)
        self.memory = nn.Identity()  # for a plan, which may gather the encoder's output here for all cross attentions
        self.final_norm = NORMS[config.norm](h, config.layernorm_epsilon)
        self.head = nn.Linear(h, vocab, bias=config.add_bias_linear)
        self.token_loss = TokenLoss(config.loss_chunk_tokens, config.z_loss_coeff)
        self.restore()

    def make_bias(self, bidirectional: bool) -> RelativeBias | None:
        """The relative bias of all layers of a stack, where the config has one."""
        c = self.config
        if c.positions != "relative":
            return None
        return RelativeBias(
            c.relative_attention_num_buckets, c.num_attention_heads, c.relative_attention_max_distance, bidirectional
        )

    def restore(self) -> None:
        """Tie head and embedding where the config says so: what to_empty undoes."""
        if not self.config.untie_embeddings_and_output_weights and self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.weight

    def initial(self, name: str) -> tuple[str, float]:
        """A parameter's initialization: Megatron's rules (config/parameters.py: initial), or with an initializer_factor
        T5's own.

        T5's are N(0, factor^2 / width of the layer's input), and N(0, factor^2) for embeddings and output layer. The
        standard deviation of query weights is also divided by the square root of a head's width, as scores are not.
        """
        c, factor = self.config, self.config.initializer_factor
        kind = parameter_kind(c, name)
        if factor is None or kind.initial in ("zeros", "ones", "norm", "kaiming"):
            return initial(c, name)
        widths = {
            "embedding": 1, "output layer": 1, "query": c.hidden_size * c.head_dim,
            "attention output": c.num_attention_heads * c.head_dim, "mlp output": c.ffn_size,
        }  # fmt: skip
        return "normal", factor * widths.get(kind.name, c.hidden_size) ** -0.5

    def forward(
        self, inputs: Tensor | None, hidden: Tensor | None = None, *, decoder_input_ids: Tensor,
        padding_mask: Tensor | None = None, decoder_padding_mask: Tensor | None = None,
        labels: Tensor | None = None, loss_weights: Tensor | None = None,
        samples: Tensor | None = None, step: Tensor | None = None, coordinates: Tensor | None = None,
        decoder_coordinates: Tensor | None = None, cache: Cache | None = None, logits_to_keep: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """The forward pass.

        inputs: ids [b, s] int64, or on a later pipeline stage the hidden states [b, s, h] of the encoder.
        hidden: [b, t, h], the decoder's hidden states, on a stage that begins inside the decoder.
        decoder_input_ids: [b, t] int64.
        padding_mask [b, s], decoder_padding_mask [b, t]: 1 or True for tokens, 0 for padding, of the whole sequences
            also where coordinates are a shard. Padding after a decoder's tokens needs no mask, as it is causal.
        labels, loss_weights: [b, t], see TokenLoss; with labels the result is float32 losses [b, t].
        samples [b] (global sample numbers) and step []: key the dropout masks; needed in training mode with dropout.
        coordinates: [s], positions of the encoder's tokens in the whole sequence (default: 0 .. s-1, s as of `inputs`).
        decoder_coordinates: [t], those of the decoder's tokens.
        cache: keys and values of earlier calls (layers/cache.py), also those of the encoder's output; once it has
            these, inputs is None. It has all positions, and takes the keys and values of these tokens.
        logits_to_keep: int64 [n], positions of the t whose logits are computed, [b, n, V] (default: all).
        Returns losses, or logits [b, t, V]; on a stage without the head the encoder's hidden states, with the
        decoder's once that has begun.
        """
        c, device = self.config, decoder_input_ids.device
        encoder, decoder = (
            [layer for n, layer in self.layers.items() if (int(n) < c.num_layers) is first] for first in (True, False)
        )
        padding = None if padding_mask is None else padding_mask.bool()
        x = inputs
        if encoder and inputs is not None:
            positions = coordinates if cache is None else cache.source_positions
            if positions is None:
                positions = torch.arange(inputs.shape[1], device=device)
            dropout_keys = build_dropout_keys(self, samples, step, positions)
            relative = None if self.encoder_bias is None else self.encoder_bias(positions.shape[-1])
            if not inputs.is_floating_point():
                x = self.encoder_dropout(self.embed(inputs, positions), dropout_keys)
            mask = AttentionMask(causal=False, padding=padding, relative=relative, dropout_keys=dropout_keys)
            x = self.run_layers(encoder, x, mask, None, dropout_keys, None, None, cache)
            if self.encoder_norm is not None:
                x = self.encoder_norm(x)
        if not decoder:
            return x
        positions = decoder_coordinates if cache is None else cache.positions
        if positions is None:
            positions = torch.arange(decoder_input_ids.shape[1], device=device)
        dropout_keys = build_dropout_keys(self, samples, step, positions)
        y = self.decoder_dropout(self.embed(decoder_input_ids, positions), dropout_keys) if hidden is None else hidden
        length = positions.shape[-1] if cache is None else cache.length
        mask = AttentionMask(
            padding=None if decoder_padding_mask is None else decoder_padding_mask.bool(),
            relative=None if self.decoder_bias is None else self.decoder_bias(length), dropout_keys=dropout_keys,
        )  # fmt: skip
        memory = None if x is None else self.memory(x)
        memory_mask = AttentionMask(causal=False, padding=padding, dropout_keys=dropout_keys)
        y = self.run_layers(decoder, y, mask, None, dropout_keys, memory, memory_mask, cache)
        if self.head is None:  # a clone, because fully_shard hooks outputs, which must not be views of inputs
            return y if x is None else (x.clone(), y)
        return self.finish(y if logits_to_keep is None else y[:, logits_to_keep], labels, loss_weights)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Word embeddings, plus position embeddings where the config has them: [b, s] -> [b, s, h]."""
        x = self.embedding(ids)
        return x if self.position_embedding is None else x + self.position_embedding(positions.expand(len(ids), -1))

    def finish(self, y: Tensor, labels: Tensor | None, loss_weights: Tensor | None) -> Tensor:
        """Logits, or with labels losses, of the decoder's last hidden states."""
        y = self.final_norm(y)
        if self.config.scale_output:
            y = y * self.config.hidden_size**-0.5
        if labels is None:
            return self.head(y)
        return self.token_loss(y, self.head.weight, labels, loss_weights, self.head.bias)
