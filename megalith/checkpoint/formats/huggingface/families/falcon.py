"""Falcon (TII, 2023): one key head or groups, attention and MLP side by side, rotary positions or ALiBi.

In the new decoder architecture (40B, 180B) key heads have groups of queries; before it (7B) there is one, or all (RW).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.families.bloom import COPIES, LAYER
from megalith.checkpoint.formats.huggingface.families.llama import rope, rope_theirs
from megalith.checkpoint.formats.huggingface.family import PLAIN, Family, Rule, Setting, activation, activation_name
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig


def _more_ours(given: Mapping[str, Any]) -> dict[str, Any]:
    heads, new = given["num_attention_heads"], given.get("new_decoder_architecture", False)
    groups = given.get("num_kv_heads") or heads if new else 1 if given.get("multi_query", True) else heads
    norms = given.get("num_ln_in_parallel_attn") or (2 if new else 1)
    parallel = new or given.get("parallel_attn", True)
    positions = {"position_embedding_type": "alibi", "scaled_alibi": True} if given.get("alibi", False) else rope(given)
    return {
        "position_embedding_type": "rope",
        **positions,
        **activation(PLAIN, given.get("activation", "gelu")),
        "num_query_groups": groups,
        "parallel_attn": parallel,
        "parallel_layernorm": new and norms == 2,  # before it the norms are not counted
        "untie_embeddings_and_output_weights": not given.get("tie_word_embeddings", True),
    }


def _more_theirs(config: RunConfig) -> dict[str, Any]:
    m = config.model
    new = m.parallel_layernorm or m.num_kv_heads not in (1, m.num_attention_heads)
    return {
        **({} if m.positions == "alibi" else rope_theirs(config)),
        "alibi": m.positions == "alibi",
        "activation": activation_name(PLAIN, m),
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
    settings=(
        Setting("num_hidden_layers", "num_layers"),
        Setting("hidden_size", "hidden_size"),
        Setting("num_attention_heads", "num_attention_heads"),
        Setting("ffn_hidden_size", "ffn_hidden_size", None),
        Setting("max_position_embeddings", "max_position_embeddings", 2048),
        Setting("vocab_size", "vocab_size"),
        Setting("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        Setting("hidden_dropout", "hidden_dropout", 0.0),
        Setting("attention_dropout", "attention_dropout", 0.0),
        Setting("initializer_range", "init_method_std", 0.02),
        Setting("bias", "add_bias_linear", False),
    ),
    more_ours=_more_ours,
    more_theirs=_more_theirs,
    copies=COPIES,
    names=(
        *(rule for rule in LAYER if "layernorm" not in rule.theirs),
        Rule("transformer.h.{layer}.input_layernorm", "layers.{layer}.attention_norm", when=_one_norm),
        Rule("transformer.h.{layer}.post_attention_layernorm", "layers.{layer}.mlp_norm", when=_one_norm),
        Rule("transformer.h.{layer}.ln_attn", "layers.{layer}.attention_norm", when=_two_norms),
        Rule("transformer.h.{layer}.ln_mlp", "layers.{layer}.mlp_norm", when=_two_norms),
    ),
)
