"""Llama (Touvron et al., 2023), Mistral (sliding window), Qwen2 (qkv biases), Qwen3 (norms of q and k heads), Gemma."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalith.checkpoint.formats.huggingface.contradictions import (
    gemma_activation,
    rope_parameters,
    rope_parameters_name,
)
from megalith.checkpoint.formats.huggingface.family import (
    GLU_ACTIVATIONS,
    REQUIRED,
    ConfigField,
    Family,
    Rule,
    TiedTo,
    activation_fields,
    activation_name,
)
from megalith.common.errors import CheckpointError, problem
from megalith.config.run import RunConfig
from megalith.config.source_fields import FieldType, RunField, checked

CONFIG_FIELDS = (
    ConfigField("num_hidden_layers", "num_layers"),
    ConfigField("hidden_size", "hidden_size"),
    ConfigField("num_attention_heads", "num_attention_heads"),
    ConfigField("num_key_value_heads", "num_query_groups", None),
    ConfigField("head_dim", "kv_channels", None),
    ConfigField("intermediate_size", "ffn_hidden_size"),
    ConfigField("max_position_embeddings", "max_position_embeddings", 2048),
    ConfigField("vocab_size", "vocab_size"),
    ConfigField("rms_norm_eps", "layernorm_epsilon", 1e-6),
    ConfigField("attention_dropout", "attention_dropout", 0.0),
    ConfigField("initializer_range", "init_method_std", 0.02),
)
CONSTANTS = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
}
RULES = (
    Rule("model.embed_tokens", "embedding"),
    Rule("model.layers.{layer}.input_layernorm", "layers.{layer}.attention_norm"),
    Rule("model.layers.{layer}.self_attn.q_proj", "layers.{layer}.attention.q"),
    Rule("model.layers.{layer}.self_attn.k_proj", "layers.{layer}.attention.k"),
    Rule("model.layers.{layer}.self_attn.v_proj", "layers.{layer}.attention.v"),
    Rule("model.layers.{layer}.self_attn.q_norm", "layers.{layer}.attention.q_norm"),
    Rule("model.layers.{layer}.self_attn.k_norm", "layers.{layer}.attention.k_norm"),
    Rule("model.layers.{layer}.self_attn.o_proj", "layers.{layer}.attention.out"),
    Rule("model.layers.{layer}.post_attention_layernorm", "layers.{layer}.mlp_norm"),
    Rule("model.layers.{layer}.mlp.gate_proj", "layers.{layer}.mlp.gate"),
    Rule("model.layers.{layer}.mlp.up_proj", "layers.{layer}.mlp.up"),
    Rule("model.layers.{layer}.mlp.down_proj", "layers.{layer}.mlp.down"),
    Rule("model.norm", "final_norm"),
    Rule("lm_head", "head"),
)

# Entries of ROPE_FIELDS that several types have.
ORIGINAL_LENGTH = ("original_max_position_embeddings", "rope_original_max_position_embeddings", REQUIRED)
FACTOR = ("factor", "rope_scaling_factor", REQUIRED)
ROPE_FIELDS: dict[str, tuple[tuple[str, str, Any], ...]] = {  # rope_type -> (its field, field of RunConfig, default)
    "linear": (FACTOR,),
    "llama3": (FACTOR, ORIGINAL_LENGTH, ("low_freq_factor", "rope_low_freq_factor", REQUIRED),
               ("high_freq_factor", "rope_high_freq_factor", REQUIRED)),
    "yarn": (FACTOR, ORIGINAL_LENGTH, ("beta_fast", "rope_beta_fast", 32.0), ("beta_slow", "rope_beta_slow", 1.0)),
}  # fmt: skip
ROPE_SCHEMA: dict[str, FieldType | RunField] = {
    **{hf_name: RunField(name) for fields in ROPE_FIELDS.values() for hf_name, name, _ in fields},
    "rope_type": FieldType(str), "type": FieldType(str), "rope_theta": RunField("rotary_base"),
    "partial_rotary_factor": RunField("rotary_percent"),
}  # fmt: skip
UNSUPPORTED_ROPE = ("attention_factor", "mscale", "mscale_all_dim", "truncate")  # of yarn: not implemented


def rope_from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
    """RunConfig's fields of the rotary embedding: from rope_scaling where it is there, else from `rope_parameters`.

    That object's rope_theta goes before the rope_theta beside it, which transformers 5 no longer writes.
    "dynamic" scales only sequences longer than max_position_embeddings, which megalith does not allow: it is read as
    "default".
    """
    where = f"config.json: {rope_parameters_name(given)}"
    found = checked(rope_parameters(given), ROPE_SCHEMA, where)
    kind = found.get("rope_type", found.get("type", "default"))
    values = {"rotary_base": float(found.get("rope_theta", given.get("rope_theta", 10000.0)))}
    if kind in ("default", "dynamic"):
        return values
    unsupported = [name for name in UNSUPPORTED_ROPE if found.get(name) is not None]
    required = [name for name, _, default in ROPE_FIELDS.get(kind, ()) if default is REQUIRED]
    if kind not in ROPE_FIELDS or unsupported or any(found.get(name) is None for name in required):
        rule = (
            f"must have a rope_type of default, dynamic, {', '.join(ROPE_FIELDS)}, with all fields of that type and "
            f"without {', '.join(UNSUPPORTED_ROPE)}"
        )
        cure = "Copy config.json again; if it is as published, this model cannot be converted"
        raise CheckpointError(problem(where, found, rule, cure))
    return {
        **values,
        "rope_scaling_type": kind,
        **{name: found.get(hf_name, default) for hf_name, name, default in ROPE_FIELDS[kind]},
    }


def rope_to_hf(config: RunConfig) -> dict[str, Any]:
    """The rotary embedding's fields of config.json that transformers 4 and 5 both read."""
    flat, kind = config.flat(), config.model.rope_scaling_type
    scaling = {"rope_type": kind, **{hf_name: flat[name] for hf_name, name, _ in ROPE_FIELDS[kind]}} if kind else None
    return {"rope_theta": config.model.rotary_base, "rope_scaling": scaling}


def windows_from_hf(given: Mapping[str, Any], used: bool, first: int = 0) -> dict[str, Any]:
    """RunConfig's fields of the sliding windows; none where all layers have full attention.

    used: whether layers from `first` on have a window, where config.json has no layer_types.
    """
    layers, width = given["num_hidden_layers"], given.get("sliding_window")
    types = given.get("layer_types") or [
        "sliding_attention" if used and number >= first else "full_attention" for number in range(layers)
    ]
    if len(types) != layers or (strange := sorted({*types} - {"sliding_attention", "full_attention"})):
        found = f"{len(types)} of them" if len(types) != layers else strange
        rule = f"must be sliding_attention or full_attention for each of {layers} layers"
        cure = "Correct it, or copy the original file again"
        raise CheckpointError(problem("config.json: layer_types", found, rule, cure))
    full = [number for number, kind in enumerate(types) if kind == "full_attention"]
    if width is None or len(full) == layers:
        return {}
    return {"sliding_window": width, "full_attention_layers": full}


def windows_to_hf(config: RunConfig) -> dict[str, Any]:
    """The sliding windows' fields of Qwen's config.json.

    layer_types, one for each layer, are read by transformers 4.53 and later; versions before took the first
    max_window_layers to have full attention.
    """
    model = config.model
    full = [model.window(number) is None for number in range(model.num_layers)]
    return {
        "use_sliding_window": not all(full),
        "sliding_window": model.sliding_window,
        "max_window_layers": full.index(False) if not all(full) else model.num_layers,
        "layer_types": ["full_attention" if each else "sliding_attention" for each in full],
    }


def common_from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
    """RunConfig's fields that all families of this file have in common and that need code."""
    tied = given.get("tie_word_embeddings", False)
    return {
        **activation_fields(GLU_ACTIVATIONS, given.get("hidden_act", "silu")),
        **rope_from_hf(given),
        "untie_embeddings_and_output_weights": not tied,
    }


def common_to_hf(config: RunConfig) -> dict[str, Any]:
    """The same fields in config.json."""
    m = config.model
    return {
        **rope_to_hf(config),
        "hidden_act": activation_name(GLU_ACTIVATIONS, m),
        "tie_word_embeddings": not m.untie_embeddings_and_output_weights,
    }


def _mistral_from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
    return {**common_from_hf(given), **windows_from_hf(given, True)}


def _gemma_from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
    return common_from_hf({**given, "hidden_act": gemma_activation(given)})


def _qwen_from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
    windows = windows_from_hf(given, given.get("use_sliding_window", False), given["max_window_layers"])
    return {**common_from_hf(given), **windows}


NO_BIASES: dict[str, tuple] = {"attention_bias": (False,), "mlp_bias": (False,)}
LLAMA = Family(
    architecture="LlamaForCausalLM",
    prefix="model.",
    config_fields=CONFIG_FIELDS,
    constants=CONSTANTS,
    supported=NO_BIASES,
    more_from_hf=common_from_hf,
    more_to_hf=lambda config: {**common_to_hf(config), "attention_bias": False, "mlp_bias": False},
    rules=RULES,
    tied={"lm_head.weight": TiedTo("model.embed_tokens.weight")},
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
MISTRAL = replace(
    LLAMA,
    architecture="MistralForCausalLM",
    hf_defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    supported={},
    more_from_hf=_mistral_from_hf,
    more_to_hf=lambda config: {**common_to_hf(config), "sliding_window": config.model.sliding_window},
)
QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN2 = replace(
    LLAMA,
    architecture="Qwen2ForCausalLM",
    hf_defaults=QWEN_DEFAULTS,
    supported={},
    constants={**CONSTANTS, "add_qkv_bias": True},
    more_from_hf=_qwen_from_hf,
    more_to_hf=lambda config: {**common_to_hf(config), **windows_to_hf(config)},
)
QWEN3 = replace(
    QWEN2,
    architecture="Qwen3ForCausalLM",
    hf_defaults={**QWEN_DEFAULTS, "head_dim": 128},
    supported=NO_BIASES,
    constants={**CONSTANTS, "qk_layernorm": True},
    more_to_hf=lambda config: {**common_to_hf(config), **windows_to_hf(config), "attention_bias": False},
)
GEMMA = replace(
    LLAMA,
    architecture="GemmaForCausalLM",
    hf_defaults={
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    supported={"attention_bias": (False,), "use_bidirectional_attention": (None, False)},
    constants={**CONSTANTS, "apply_layernorm_1p": True, "scale_embeddings": True},
    more_from_hf=_gemma_from_hf,
    more_to_hf=lambda config: {
        **common_to_hf(config),
        "hidden_activation": activation_name(GLU_ACTIVATIONS, config.model),
        "attention_bias": False,
    },
)
