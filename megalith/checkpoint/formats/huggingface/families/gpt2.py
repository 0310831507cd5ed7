"""GPT-2 (Radford et al., 2019): transformers' GPT2LMHeadModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.family import (
    MLP_ACTIVATIONS,
    QKV_TRANSPOSED,
    TRANSPOSED,
    ConfigField,
    Family,
    Rule,
    TiedTo,
    activation_fields,
    activation_name,
)
from megalith.config.run import RunConfig


def _from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
    tied = given.get("tie_word_embeddings", True)
    return {
        **activation_fields(MLP_ACTIVATIONS, given.get("activation_function", "gelu_new")),
        "untie_embeddings_and_output_weights": not tied,
    }


def _to_hf(config: RunConfig) -> dict[str, Any]:
    m = config.model
    return {
        "activation_function": activation_name(MLP_ACTIVATIONS, m),
        "embd_pdrop": m.hidden_dropout,  # not read: megalith has one dropout for it and resid_pdrop
        "tie_word_embeddings": not m.untie_embeddings_and_output_weights,
    }


QKV = ("layers.{layer}.attention.q", "layers.{layer}.attention.k", "layers.{layer}.attention.v")
GPT2 = Family(
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    config_fields=(
        ConfigField("n_layer", "num_layers"),
        ConfigField("n_embd", "hidden_size"),
        ConfigField("n_head", "num_attention_heads"),
        ConfigField("n_inner", "ffn_hidden_size", None),
        ConfigField("n_positions", "max_position_embeddings", 1024),
        ConfigField("vocab_size", "vocab_size"),
        ConfigField("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        ConfigField("resid_pdrop", "hidden_dropout", 0.1),
        ConfigField("attn_pdrop", "attention_dropout", 0.1),
        ConfigField("initializer_range", "init_method_std", 0.02),
    ),
    aliases={
        "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    supported={
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    more_from_hf=_from_hf,
    more_to_hf=_to_hf,
    rules=(
        Rule("transformer.wte", "embedding"),
        Rule("transformer.wpe", "position_embedding"),
        Rule("transformer.h.{layer}.ln_1", "layers.{layer}.attention_norm"),
        Rule("transformer.h.{layer}.attn.c_attn", QKV, QKV_TRANSPOSED),
        Rule("transformer.h.{layer}.attn.c_proj", "layers.{layer}.attention.out", TRANSPOSED),
        Rule("transformer.h.{layer}.ln_2", "layers.{layer}.mlp_norm"),
        Rule("transformer.h.{layer}.mlp.c_fc", "layers.{layer}.mlp.up", TRANSPOSED),
        Rule("transformer.h.{layer}.mlp.c_proj", "layers.{layer}.mlp.down", TRANSPOSED),
        Rule("transformer.ln_f", "final_norm"),
        Rule("lm_head", "head"),
    ),
    tied={"lm_head.weight": TiedTo("transformer.wte.weight")},
    ignored=(r".*\.attn\.(bias|masked_bias)",),  # the causal mask and the value it puts in
)  # fmt: skip
