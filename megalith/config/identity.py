"""Which fields of ModelConfig make it another model, though all shapes are the same: every field, classified once.

Weights that were trained with rotated pairs mean nothing in a model that rotates halves. So a run that resumes from a
checkpoint, or begins with its weights, must have its model; fields that may be changed on the way are noted in a line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from megalith.config.flags.text import flag, value_text
from megalith.config.sections.model import ModelConfig


def sized_by(model: ModelConfig, field: str) -> bool:
    """Whether a parameter of the model has a size that comes from this field."""
    return any(field in kind.sizes for kind in model.architecture.find("kinds").values())


# Fields, and the property of the model that they set together. None: they have no effect in this model.
IDENTITY: tuple[tuple[tuple[str, ...], Callable[[ModelConfig], Any]], ...] = (
    (("model_type",), lambda m: m.model_type),
    (("num_layers", "decoder_num_layers"), lambda m: (m.num_layers, m.decoder_layers)),
    (("hidden_size",), lambda m: m.hidden_size),
    (("num_attention_heads",), lambda m: m.num_attention_heads),
    (("ffn_hidden_size",), lambda m: m.ffn_size),
    (("kv_channels",), lambda m: m.head_dim),
    (("attention_head_type", "group_query_attention", "num_query_groups"), lambda m: m.num_kv_heads),
    (("position_embedding_type", "use_rotary_position_embeddings"), lambda m: m.positions),
    (
        ("relative_attention_num_buckets",),
        lambda m: m.relative_attention_num_buckets if m.positions == "relative" else None,
    ),
    (
        ("relative_attention_max_distance",),
        lambda m: m.relative_attention_max_distance if m.positions == "relative" else None,
    ),
    (("rotary_percent",), lambda m: m.rotary_percent if m.positions == "rope" else None),
    (("rotary_interleaved",), lambda m: m.rotary_interleaved if m.positions == "rope" else None),
    (("scaled_alibi",), lambda m: m.scaled_alibi if m.positions == "alibi" else None),
    (("embed_layernorm",), lambda m: m.embed_layernorm),
    (("parallel_attn",), lambda m: m.parallel_attn),
    (("parallel_layernorm",), lambda m: m.parallel_layernorm),
    (("normalization", "apply_layernorm_1p"), lambda m: m.norm),
    (("scale_embeddings",), lambda m: m.scale_embeddings),
    (("layernorm_epsilon",), lambda m: m.layernorm_epsilon),
    (("apply_residual_connection_post_layernorm",), lambda m: m.apply_residual_connection_post_layernorm),
    (("norm_after_residual",), lambda m: m.norm_after_residual),
    (("bert_no_binary_head",), lambda m: m.bert_no_binary_head),
    (("num_classes",), lambda m: m.num_classes if sized_by(m, "num_classes") else None),
    (("biencoder_projection_dim",), lambda m: m.biencoder_projection_dim),
    (("biencoder_shared_query_context_model",), lambda m: m.biencoder_shared_query_context_model),
    (
        ("openai_gelu", "bias_gelu_fusion", "relu", "squared_relu", "swiglu", "glu_activation"),
        lambda m: (m.activation, m.head_activation if m.architecture.head_transform else None),
    ),
    (("add_bias_linear",), lambda m: m.add_bias_linear),
    (("add_qkv_bias",), lambda m: m.add_qkv_bias or m.add_bias_linear),
    (("qk_layernorm",), lambda m: m.qk_layernorm),
    (("untie_embeddings_and_output_weights",), lambda m: m.untie_embeddings_and_output_weights),
    (("softmax_scale",), lambda m: m.softmax_scale or m.head_dim**-0.5),
    (("scale_output",), lambda m: m.scale_output),
    (("retro_layer_numbers",), lambda m: m.retrieval_layers),
    (("retro_encoder_layers",), lambda m: m.retro_encoder_layers if m.retrieval_layers else None),
    (("retro_gpt_chunk_length",), lambda m: m.retro_gpt_chunk_length if m.retrieval_layers else None),
)
BY_SHAPE = ("vocab_size", "max_position_embeddings")  # rows of a table: its shape shows them, and can be edited
NOTED = (  # changed on purpose while a model is trained further: longer texts, another regularisation
    "sliding_window", "full_attention_layers", "rotary_base", "rope_scaling_type", "rope_scaling_factor",
    "rope_original_max_position_embeddings", "rope_low_freq_factor", "rope_high_freq_factor",
    "rope_beta_fast", "rope_beta_slow",
    "hidden_dropout", "attention_dropout", "classifier_dropout", "z_loss_coeff", "retro_encoder_hidden_dropout",
    "retro_encoder_attention_dropout", "retro_num_neighbors", "retro_num_retrieved_chunks",
)  # fmt: skip
INDIFFERENT = (  # changes nothing of a model that has its weights, but for rounding
    "make_vocab_size_divisible_by", "init_method_std", "initializer_factor", "init_method_xavier_uniform",
    "apply_query_key_layer_scaling", "attention_backend", "loss_chunk_tokens",
)  # fmt: skip


class Differences(NamedTuple):
    """The fields that make it another model, as (field, now, then); and lines on changes that are only noted."""

    incompatible: list[tuple[str, Any, Any]]
    noted: list[str]


def differences(now: ModelConfig, then: ModelConfig) -> Differences:
    """How a model differs from the one that a checkpoint was written by."""
    incompatible: list[tuple[str, Any, Any]] = []
    for fields, effect in IDENTITY:
        if effect(now) != effect(then):
            pairs = [(name, getattr(now, name), getattr(then, name)) for name in fields]
            incompatible += [pair for pair in pairs if pair[1] != pair[2]]  # none: it follows from another field
    return Differences(incompatible, changes(now, then, BY_SHAPE + NOTED))


def changes(now: object, then: object, names: tuple[str, ...]) -> list[str]:
    """A sentence for each of these fields of a section that is not what it was."""
    pairs = [(name, getattr(now, name), getattr(then, name)) for name in names]
    return [change_text(name, new, old) for name, new, old in pairs if new != old]


def change_text(field: str, now: object, then: object) -> str:
    """--seed is 7, was 1234."""
    return f"{flag(field)} is {value_text(now)}, was {value_text(then)}"
