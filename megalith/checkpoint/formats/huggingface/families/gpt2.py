"""GPT-2 (Radford et al., 2019): transformers' GPT2LMHeadModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.family import (
    PLAIN,
    THIRDS_TRANSPOSED,
    TRANSPOSED,
    Copy,
    Family,
    Rule,
    Setting,
    activation,
    activation_name,
)
from megalith.config.run import RunConfig


def _more_ours(given: Mapping[str, Any]) -> dict[str, Any]:
    tied = given.get("tie_word_embeddings", True)
    return {
        **activation(PLAIN, given.get("activation_function", "gelu_new")),
        "untie_embeddings_and_output_weights": not tied,
    }


def _more_theirs(config: RunConfig) -> dict[str, Any]:
    m = config.model
    return {
        "activation_function": activation_name(PLAIN, m),
        "embd_pdrop": m.hidden_dropout,
        "tie_word_embeddings": not m.untie_embeddings_and_output_weights,
    }


QKV = ("layers.{layer}.attention.q", "layers.{layer}.attention.k", "layers.{layer}.attention.v")
GPT2 = Family(
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    settings=(
        Setting("n_layer", "num_layers"),
        Setting("n_embd", "hidden_size"),
        Setting("n_head", "num_attention_heads"),
        Setting("n_inner", "ffn_hidden_size", None),
        Setting("n_positions", "max_position_embeddings", 1024),
        Setting("vocab_size", "vocab_size"),
        Setting("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        Setting("resid_pdrop", "hidden_dropout", 0.1),
        Setting("attn_pdrop", "attention_dropout", 0.1),
        Setting("initializer_range", "init_method_std", 0.02),
    ),
    aliases={
        "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
    },
    only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    more_ours=_more_ours,
    more_theirs=_more_theirs,
    names=(
        Rule("transformer.wte", "embedding"),
        Rule("transformer.wpe", "position_embedding"),
        Rule("transformer.h.{layer}.ln_1", "layers.{layer}.attention_norm"),
        Rule("transformer.h.{layer}.attn.c_attn", QKV, THIRDS_TRANSPOSED),
        Rule("transformer.h.{layer}.attn.c_proj", "layers.{layer}.attention.out", TRANSPOSED),
        Rule("transformer.h.{layer}.ln_2", "layers.{layer}.mlp_norm"),
        Rule("transformer.h.{layer}.mlp.c_fc", "layers.{layer}.mlp.up", TRANSPOSED),
        Rule("transformer.h.{layer}.mlp.c_proj", "layers.{layer}.mlp.down", TRANSPOSED),
        Rule("transformer.ln_f", "final_norm"),
        Rule("lm_head", "head"),
    ),
    copies={"lm_head.weight": Copy("transformer.wte.weight")},
    surplus=(r".*\.attn\.(bias|masked_bias)",),
)  # fmt: skip
