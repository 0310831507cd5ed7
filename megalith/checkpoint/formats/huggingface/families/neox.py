"""GPT-NeoX and Pythia (EleutherAI, 2022): rotary positions in part of each head, attention and MLP in parallel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.contradictions import rope_parameters, rope_parameters_name
from megalith.checkpoint.formats.huggingface.families.bloom import QKV
from megalith.checkpoint.formats.huggingface.families.llama import ROPE_SCHEMA, rope_from_hf, rope_to_hf
from megalith.checkpoint.formats.huggingface.family import (
    GROUPED_QKV,
    MLP_ACTIVATIONS,
    ConfigField,
    Family,
    Rule,
    TiedTo,
    activation_fields,
    activation_name,
)
from megalith.config.run import RunConfig
from megalith.config.source_fields import checked


def _from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
    found = checked(rope_parameters(given), ROPE_SCHEMA, f"config.json: {rope_parameters_name(given)}")
    parallel = given.get("use_parallel_residual", True)
    values = rope_from_hf({**given, "rope_theta": given.get("rotary_emb_base", 10000)})
    return {
        **values,
        **activation_fields(MLP_ACTIVATIONS, given.get("hidden_act", "gelu")),
        "rotary_percent": found.get("partial_rotary_factor", given.get("rotary_pct", 0.25)),
        "parallel_attn": parallel,
        "parallel_layernorm": parallel,
        "untie_embeddings_and_output_weights": not given.get("tie_word_embeddings", False),
    }


def _to_hf(config: RunConfig) -> dict[str, Any]:
    m = config.model
    return {
        "rope_scaling": rope_to_hf(config)["rope_scaling"],
        "rotary_emb_base": m.rotary_base,
        "rotary_pct": m.rotary_percent,
        "hidden_act": activation_name(MLP_ACTIVATIONS, m),
        "use_parallel_residual": m.parallel_attn,
        "tie_word_embeddings": not m.untie_embeddings_and_output_weights,
    }


NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    config_fields=(
        ConfigField("num_hidden_layers", "num_layers"),
        ConfigField("hidden_size", "hidden_size"),
        ConfigField("num_attention_heads", "num_attention_heads"),
        ConfigField("intermediate_size", "ffn_hidden_size"),
        ConfigField("max_position_embeddings", "max_position_embeddings", 2048),
        ConfigField("vocab_size", "vocab_size"),
        ConfigField("layer_norm_eps", "layernorm_epsilon", 1e-5),
        ConfigField("hidden_dropout", "hidden_dropout", 0.0),
        ConfigField("attention_dropout", "attention_dropout", 0.0),
        ConfigField("initializer_range", "init_method_std", 0.02),
    ),
    constants={"position_embedding_type": "rope"},
    supported={"attention_bias": (True,)},
    more_from_hf=_from_hf,
    more_to_hf=_to_hf,
    rules=(
        Rule("gpt_neox.embed_in", "embedding"),
        Rule("gpt_neox.layers.{layer}.input_layernorm", "layers.{layer}.attention_norm"),
        Rule("gpt_neox.layers.{layer}.attention.query_key_value", QKV, GROUPED_QKV),
        Rule("gpt_neox.layers.{layer}.attention.dense", "layers.{layer}.attention.out"),
        Rule("gpt_neox.layers.{layer}.post_attention_layernorm", "layers.{layer}.mlp_norm"),
        Rule("gpt_neox.layers.{layer}.mlp.dense_h_to_4h", "layers.{layer}.mlp.up"),
        Rule("gpt_neox.layers.{layer}.mlp.dense_4h_to_h", "layers.{layer}.mlp.down"),
        Rule("gpt_neox.final_layer_norm", "final_norm"),
        Rule("embed_out", "head"),
    ),
    file_names={"lm_head.weight": "embed_out.weight"},
    tied={"embed_out.weight": TiedTo("gpt_neox.embed_in.weight")},
    ignored=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
