"""Components of several models, built from a config: layers, dropout keys."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from megalith.config.sections.model import ModelConfig
from megalith.layers.attention import CoreAttention, CrossAttention, SelfAttention
from megalith.layers.block import Block
from megalith.layers.chunked_attention import ChunkedCrossAttention, NeighborCrossAttention, NeighborEncoder
from megalith.layers.dropout import row_keys
from megalith.layers.mlp import MLP
from megalith.layers.norm import NORMS

# From Megatron's values of --attention-backend to those of CoreAttention.
BACKENDS = {"flash": "auto", "fused": "auto", "unfused": "explicit", "local": "explicit"}


def make_layer(c: ModelConfig, number: int) -> Block:
    """The layer with this number in the whole model, as the config describes it."""
    site, cross, encoder = f"layers.{number}", None, None
    if c.decoder_layers and number >= c.num_layers:
        cross = make_cross(c, site)
    elif number in c.retrieval_layers:
        chunks = {"chunk_length": c.retro_gpt_chunk_length}
        cross = make_cross(c, site, ChunkedCrossAttention, bias=False, **chunks)
        encoder = make_neighbor_encoder(c, f"{site}.encoder") if number == c.retrieval_layers[0] else None
    return make_block(c, site, c.window(number), cross, encoder)


def make_block(
    c: ModelConfig, site: str, window: int | None = None, cross: CrossAttention | None = None,
    encoder: NeighborEncoder | None = None,
) -> Block:  # fmt: skip
    """A block of the layer at `site`. window: see AttentionMask."""
    attention = SelfAttention(
        c.hidden_size, c.num_attention_heads, c.num_kv_heads, c.head_dim, bias=c.add_bias_linear,
        qkv_bias=c.add_bias_linear or c.add_qkv_bias, core=make_core(c, site), interleaved=c.rotary_interleaved,
        head_norm=c.layernorm_epsilon if c.qk_layernorm else None, window=window,
    )  # fmt: skip
    return Block(
        c.hidden_size, c.norm, c.layernorm_epsilon, attention, make_mlp(c), dropout=c.hidden_dropout, site=site,
        normed_residual=c.apply_residual_connection_post_layernorm, norm_after=c.norm_after_residual,
        parallel=c.parallel_attn, two_norms=c.two_norms, cross=cross, encoder=encoder,
    )  # fmt: skip


def make_cross(
    c: ModelConfig, site: str, kind: type[CrossAttention] = CrossAttention, **changed: Any
) -> CrossAttention:  # fmt: skip
    """Cross attention of the layer at `site`; it has no norms of query and key heads."""
    options: dict[str, Any] = {"bias": c.add_bias_linear, "qkv_bias": c.add_bias_linear or c.add_qkv_bias}
    options |= {"core": make_core(c, f"{site}.cross"), **changed}
    return kind(c.hidden_size, c.num_attention_heads, c.num_kv_heads, c.head_dim, **options)


def make_neighbor_encoder(c: ModelConfig, site: str) -> NeighborEncoder:
    """Retro's encoder, whose first layer attends to chunks (as Megatron's)."""
    c = dataclasses.replace(  # type: ignore[type-var]
        c, hidden_dropout=c.retro_encoder_hidden_dropout, attention_dropout=c.retro_encoder_attention_dropout
    )
    sites = [f"{site}.layers.{number}" for number in range(c.retro_encoder_layers)]
    cross = make_cross(c, sites[0], NeighborCrossAttention, chunk_length=c.retro_gpt_chunk_length)
    layers = [make_block(c, each, cross=None if number else cross) for number, each in enumerate(sites)]
    return NeighborEncoder(layers, NORMS[c.norm](c.hidden_size, c.layernorm_epsilon))


def make_core(c: ModelConfig, site: str) -> CoreAttention:
    """Core attention of the layer at `site`."""
    return CoreAttention(
        c.attention_dropout, f"{site}.scores", BACKENDS.get(c.attention_backend, c.attention_backend), c.softmax_scale
    )


def make_mlp(c: ModelConfig) -> MLP:
    """The feed-forward half of a layer."""
    return MLP(c.hidden_size, c.ffn_size, c.activation, gated=c.gated, bias=c.add_bias_linear)


def build_dropout_keys(
    model: nn.Module, samples: Tensor | None, step: Tensor | None, coordinates: Tensor
) -> Tensor | None:  # fmt: skip
    """Dropout keys int32 [b, s] for `model` (with .config and .seed), or None where nothing is dropped."""
    lora = getattr(model, "lora", None)  # parallel/lora.py
    adapters = 0.0 if lora is None else lora.lora_dropout
    c = model.config
    rates = [c.hidden_dropout, c.attention_dropout, adapters]
    if hasattr(model, "neighbor_dropout"):  # of a Retro; `c.architecture` would say so too, and break the graph
        rates += [c.retro_encoder_hidden_dropout, c.retro_encoder_attention_dropout]
    if not model.training or not any(rates):
        return None
    if samples is None or step is None:
        raise ValueError(
            "Dropout needs `samples` and `step` in training mode. "
            "Pass them, or call model.eval(), or set the dropouts to 0."
        )
    return row_keys(model.seed, step, samples, coordinates)
