"""Llama (Touvron et al., 2023) and its like: transformers' LlamaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.huggingface_families import GATED, Family, Rule, Setting, activation, activation_name
from megalith.common.errors import CheckpointError, problem
from megalith.config.run import RunConfig

SETTINGS = (
    Setting("num_hidden_layers", "num_layers"),
    Setting("hidden_size", "hidden_size"),
    Setting("num_attention_heads", "num_attention_heads"),
    Setting("num_key_value_heads", "num_query_groups", None),
    Setting("head_dim", "kv_channels", None),
    Setting("intermediate_size", "ffn_hidden_size"),
    Setting("max_position_embeddings", "max_position_embeddings", 2048),
    Setting("vocab_size", "vocab_size"),
    Setting("rms_norm_eps", "layernorm_epsilon", 1e-6),
    Setting("attention_dropout", "attention_dropout", 0.0),
    Setting("initializer_range", "init_method_std", 0.02),
)
ALWAYS = {"position_embedding_type": "rope", "normalization": "RMSNorm", "add_bias_linear": False, "hidden_dropout": 0.0}
NAMES = (
    Rule("model.embed_tokens", "embedding"),
    Rule("model.layers.*.input_layernorm", "layers.*.attention_norm"),
    Rule("model.layers.*.self_attn.q_proj", "layers.*.attention.q"),
    Rule("model.layers.*.self_attn.k_proj", "layers.*.attention.k"),
    Rule("model.layers.*.self_attn.v_proj", "layers.*.attention.v"),
    Rule("model.layers.*.self_attn.q_norm", "layers.*.attention.q_norm"),
    Rule("model.layers.*.self_attn.k_norm", "layers.*.attention.k_norm"),
    Rule("model.layers.*.self_attn.o_proj", "layers.*.attention.out"),
    Rule("model.layers.*.post_attention_layernorm", "layers.*.mlp_norm"),
    Rule("model.layers.*.mlp.gate_proj", "layers.*.mlp.gate"),
    Rule("model.layers.*.mlp.up_proj", "layers.*.mlp.up"),
    Rule("model.layers.*.mlp.down_proj", "layers.*.mlp.down"),
    Rule("model.norm", "final_norm"),
    Rule("lm_head", "head"),
)


def rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields of the rotary embedding: of transformers 5's `rope_parameters`, or of the fields before it."""
    found = {**(given.get("rope_scaling") or {}), **(given.get("rope_parameters") or {})}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind != "default":
        raise CheckpointError(problem("config.json: rope_type", kind, "the known ones are default", "This model cannot be converted"))
    return {"rotary_base": float(found.get("rope_theta", given.get("rope_theta", 10000.0)))}


def rope_theirs(config: RunConfig) -> dict[str, Any]:
    """Fields that transformers 4 and 5 both read."""
    return {"rope_theta": config.model.rotary_base, "rope_scaling": None}


def _more_ours(given: Mapping[str, Any]) -> dict[str, Any]:
    tied = given.get("tie_word_embeddings", False)
    return {**activation(GATED, given.get("hidden_act", "silu")), **rope(given), "untie_embeddings_and_output_weights": not tied}


def _more_theirs(config: RunConfig) -> dict[str, Any]:
    m = config.model
    return {
        **rope_theirs(config),
        "hidden_act": activation_name(GATED, m),
        "tie_word_embeddings": not m.untie_embeddings_and_output_weights,
        "attention_bias": False,
        "mlp_bias": False,
    }


LLAMA = Family(
    architecture="LlamaForCausalLM",
    prefix="model.",
    settings=SETTINGS,
    always=ALWAYS,
    only={"attention_bias": (False,), "mlp_bias": (False,)},
    more_ours=_more_ours,
    more_theirs=_more_theirs,
    names=NAMES,
    surplus=(r".*\.rotary_emb\.inv_freq",),
)
