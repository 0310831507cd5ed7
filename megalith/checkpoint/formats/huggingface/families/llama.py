"""Llama (Touvron et al., 2023) and its like: Mistral (a sliding window), Qwen2 (biases), Qwen3 (a norm of each head), Gemma."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalith.checkpoint.formats.huggingface.family import (
    GATED,
    REQUIRED,
    Copy,
    Family,
    Rule,
    Setting,
    activation,
    activation_name,
)
from megalith.checkpoint.formats.huggingface.twice import gemma_activation, rope_name, rope_of
from megalith.common.errors import CheckpointError, problem
from megalith.config.run import RunConfig
from megalith.config.source_fields import Kind, Ours, checked

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
ALWAYS = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
}
NAMES = (
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


LENGTH = ("original_max_position_embeddings", "rope_original_max_position_embeddings", REQUIRED)
FACTOR = ("factor", "rope_scaling_factor", REQUIRED)
ROPE: dict[str, tuple[tuple[str, str, Any], ...]] = {  # rope_type -> (field of rope_scaling, ours, what it is where it lacks it)
    "linear": (FACTOR,),
    "llama3": (FACTOR, LENGTH, ("low_freq_factor", "rope_low_freq_factor", REQUIRED),
               ("high_freq_factor", "rope_high_freq_factor", REQUIRED)),
    "yarn": (FACTOR, LENGTH, ("beta_fast", "rope_beta_fast", 32.0), ("beta_slow", "rope_beta_slow", 1.0)),
}  # fmt: skip
INNER: dict[str, Kind | Ours] = {
    **{theirs: Ours(ours) for rows in ROPE.values() for theirs, ours, _ in rows},
    "rope_type": Kind(str), "type": Kind(str), "rope_theta": Ours("rotary_base"), "partial_rotary_factor": Ours("rotary_percent"),
}  # fmt: skip
UNKNOWN_ROPE = ("attention_factor", "mscale", "mscale_all_dim", "truncate")  # of yarn: not built


def rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields of the rotary embedding: of transformers 5's `rope_parameters`, or of the fields before it.

    "dynamic" stretches only sequences longer than max_position_embeddings, which no config of ours allows: here it is "default".
    """
    where = f"config.json: {rope_name(given)}"
    found = checked(rope_of(given), INNER, where)
    kind = found.get("rope_type", found.get("type", "default"))
    values = {"rotary_base": float(found.get("rope_theta", given.get("rope_theta", 10000.0)))}
    if kind in ("default", "dynamic"):
        return values
    strange = [name for name in UNKNOWN_ROPE if found.get(name) is not None]
    missing = [name for name, _, default in ROPE.get(kind, ()) if default is REQUIRED and found.get(name) is None]
    if kind not in ROPE or strange or missing:
        rule = f"rope_type is one of default, dynamic, {', '.join(ROPE)}, with all their fields and without {', '.join(UNKNOWN_ROPE)}"
        cure = "Copy config.json again; if it is as published, this model cannot be converted"
        raise CheckpointError(problem(where, found, rule, cure))
    return {
        **values,
        "rope_scaling_type": kind,
        **{ours: found.get(name, default) for name, ours, default in ROPE[kind]},
    }


def rope_theirs(config: RunConfig) -> dict[str, Any]:
    """The fields that transformers 4 and 5 both read."""
    flat, kind = config.flat(), config.model.rope_scaling_type
    scaling = {"rope_type": kind, **{name: flat[ours] for name, ours, _ in ROPE[kind]}} if kind else None
    return {"rope_theta": config.model.rotary_base, "rope_scaling": scaling}


def windows(given: Mapping[str, Any], used: bool, first: int = 0) -> dict[str, Any]:
    """Our fields of sliding windows. used: where config.json has no layer_types, whether layers from `first` on have one."""
    layers, width = given["num_hidden_layers"], given.get("sliding_window")
    types = given.get("layer_types") or [
        "sliding_attention" if used and number >= first else "full_attention" for number in range(layers)
    ]
    if len(types) != layers or (strange := sorted({*types} - {"sliding_attention", "full_attention"})):
        found = f"{len(types)} of them" if len(types) != layers else strange
        rule = f"each of {layers} layers has one, sliding_attention or full_attention"
        raise CheckpointError(
            problem("config.json: layer_types", found, rule, "Correct it, or copy the original file again")
        )
    full = [number for number, kind in enumerate(types) if kind == "full_attention"]
    if width is None or len(full) == layers:
        return {}
    return {"sliding_window": width, "full_attention_layers": full}


def windows_theirs(config: RunConfig) -> dict[str, Any]:
    """Fields of Qwen's configs: layer by layer, as transformers 4.5 and later read them; before that the first layers were full ones."""
    model = config.model
    full = [model.window(number) is None for number in range(model.num_layers)]
    return {
        "use_sliding_window": not all(full),
        "sliding_window": model.sliding_window,
        "max_window_layers": full.index(False) if not all(full) else model.num_layers,
        "layer_types": ["full_attention" if each else "sliding_attention" for each in full],
    }


def common(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields of what all families here have in common and no table says."""
    tied = given.get("tie_word_embeddings", False)
    return {
        **activation(GATED, given.get("hidden_act", "silu")),
        **rope(given),
        "untie_embeddings_and_output_weights": not tied,
    }


def common_theirs(config: RunConfig) -> dict[str, Any]:
    """The same in theirs."""
    m = config.model
    return {
        **rope_theirs(config),
        "hidden_act": activation_name(GATED, m),
        "tie_word_embeddings": not m.untie_embeddings_and_output_weights,
    }


def _mistral(given: Mapping[str, Any]) -> dict[str, Any]:
    return {**common(given), **windows(given, True)}


def _gemma(given: Mapping[str, Any]) -> dict[str, Any]:
    return common({**given, "hidden_act": gemma_activation(given)})


def _qwen(given: Mapping[str, Any]) -> dict[str, Any]:
    return {**common(given), **windows(given, given.get("use_sliding_window", False), given["max_window_layers"])}


NO_BIASES: dict[str, tuple] = {"attention_bias": (False,), "mlp_bias": (False,)}
LLAMA = Family(
    architecture="LlamaForCausalLM",
    prefix="model.",
    settings=SETTINGS,
    always=ALWAYS,
    only=NO_BIASES,
    more_ours=common,
    more_theirs=lambda config: {**common_theirs(config), "attention_bias": False, "mlp_bias": False},
    names=NAMES,
    copies={"lm_head.weight": Copy("model.embed_tokens.weight")},
    surplus=(r".*\.rotary_emb\.inv_freq",),
)
MISTRAL = replace(
    LLAMA,
    architecture="MistralForCausalLM",
    absent={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    only={},
    more_ours=_mistral,
    more_theirs=lambda config: {**common_theirs(config), "sliding_window": config.model.sliding_window},
)
QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
QWEN2 = replace(
    LLAMA,
    architecture="Qwen2ForCausalLM",
    absent=QWEN,
    only={},
    always={**ALWAYS, "add_qkv_bias": True},
    more_ours=_qwen,
    more_theirs=lambda config: {**common_theirs(config), **windows_theirs(config)},
)
QWEN3 = replace(
    QWEN2,
    architecture="Qwen3ForCausalLM",
    absent={**QWEN, "head_dim": 128},
    only=NO_BIASES,
    always={**ALWAYS, "qk_layernorm": True},
    more_theirs=lambda config: {**common_theirs(config), **windows_theirs(config), "attention_bias": False},
)
GEMMA = replace(
    LLAMA,
    architecture="GemmaForCausalLM",
    absent={"num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True},
    only={"attention_bias": (False,), "use_bidirectional_attention": (None, False)},
    always={**ALWAYS, "apply_layernorm_1p": True, "scale_embeddings": True},
    more_ours=_gemma,
    more_theirs=lambda config: {
        **common_theirs(config),
        "hidden_activation": activation_name(GATED, config.model),
        "attention_bias": False,
    },
)
