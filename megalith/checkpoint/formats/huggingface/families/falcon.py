"""Falcon (TII, 2023): multi-query or grouped-query attention, attention and MLP in parallel, rotary positions or ALiBi.

The new decoder architecture (40B, 180B) has grouped queries; before it there is one key head (7B), or one for each
query head (RW).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.families.bloom import RULES, TIED
from megalith.checkpoint.formats.huggingface.families.llama import rope_from_hf, rope_to_hf
from megalith.checkpoint.formats.huggingface.family import (
    MLP_ACTIVATIONS,
    ConfigField,
    Family,
    Rule,
    activation_fields,
    activation_name,
)
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig


def _from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
    heads, new = given["num_attention_heads"], given.get("new_decoder_architecture", False)
    groups = given.get("num_kv_heads") or heads if new else 1 if given.get("multi_query", True) else heads
    norms = given.get("num_ln_in_parallel_attn") or (2 if new else 1)
    parallel = new or given.get("parallel_attn", True)
    alibi = {"position_embedding_type": "alibi", "scaled_alibi": True}
    return {
        "position_embedding_type": "rope",
        **(alibi if given.get("alibi", False) else rope_from_hf(given)),
        **activation_fields(MLP_ACTIVATIONS, given.get("activation", "gelu")),
        "num_query_groups": groups,
        "parallel_attn": parallel,
        "parallel_layernorm": new and norms == 2,  # num_ln_in_parallel_attn counts in it alone
        "untie_embeddings_and_output_weights": not given.get("tie_word_embeddings", True),
    }


def _to_hf(config: RunConfig) -> dict[str, Any]:
    m = config.model
    new = m.parallel_layernorm or m.num_kv_heads not in (1, m.num_attention_heads)
    return {
        **({} if m.positions == "alibi" else rope_to_hf(config)),
        "alibi": m.positions == "alibi",
        "activation": activation_name(MLP_ACTIVATIONS, m),
        "new_decoder_architecture": new,
        "multi_query": m.num_kv_heads == 1,
        "num_kv_heads": m.num_kv_heads,
        "parallel_attn": m.parallel_attn,
        "num_ln_in_parallel_attn": 2 if m.parallel_layernorm else 1,
        "tie_word_embeddings": not m.untie_embeddings_and_output_weights,
    }


def _two_norms(model: ModelConfig) -> bool:
    return model.parallel_layernorm


def _one_norm(model: ModelConfig) -> bool:
    return not model.parallel_layernorm


FALCON = Family(
    architecture="FalconForCausalLM",
    prefix="transformer.",
    config_fields=(
        ConfigField("num_hidden_layers", "num_layers"),
        ConfigField("hidden_size", "hidden_size"),
        ConfigField("num_attention_heads", "num_attention_heads"),
        ConfigField("ffn_hidden_size", "ffn_hidden_size", None),
        ConfigField("max_position_embeddings", "max_position_embeddings", 2048),
        ConfigField("vocab_size", "vocab_size"),
        ConfigField("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        ConfigField("hidden_dropout", "hidden_dropout", 0.0),
        ConfigField("attention_dropout", "attention_dropout", 0.0),
        ConfigField("initializer_range", "init_method_std", 0.02),
        ConfigField("bias", "add_bias_linear", False),
    ),
    more_from_hf=_from_hf,
    more_to_hf=_to_hf,
    tied=TIED,
    rules=(
        *(rule for rule in RULES if "layernorm" not in rule.hf_module),
        Rule("transformer.h.{layer}.input_layernorm", "layers.{layer}.attention_norm", when=_one_norm),
        Rule("transformer.h.{layer}.post_attention_layernorm", "layers.{layer}.mlp_norm", when=_one_norm),
        Rule("transformer.h.{layer}.ln_attn", "layers.{layer}.attention_norm", when=_two_norms),
        Rule("transformer.h.{layer}.ln_mlp", "layers.{layer}.mlp_norm", when=_two_norms),
    ),
)
