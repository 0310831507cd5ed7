"""Bloom (BigScience, 2022): ALiBi, a norm of the embeddings, q, k and v of each head one after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.family import GROUPED_QKV, ConfigField, Family, Rule, TiedTo

QKV = ("layers.{layer}.attention.q", "layers.{layer}.attention.k", "layers.{layer}.attention.v")
RULES = (  # also Falcon's
    Rule("transformer.word_embeddings", "embedding"),
    Rule("transformer.h.{layer}.input_layernorm", "layers.{layer}.attention_norm"),
    Rule("transformer.h.{layer}.self_attention.query_key_value", QKV, GROUPED_QKV),
    Rule("transformer.h.{layer}.self_attention.dense", "layers.{layer}.attention.out"),
    Rule("transformer.h.{layer}.post_attention_layernorm", "layers.{layer}.mlp_norm"),
    Rule("transformer.h.{layer}.mlp.dense_h_to_4h", "layers.{layer}.mlp.up"),
    Rule("transformer.h.{layer}.mlp.dense_4h_to_h", "layers.{layer}.mlp.down"),
    Rule("transformer.ln_f", "final_norm"),
    Rule("lm_head", "head"),
)
TIED = {"lm_head.weight": TiedTo("transformer.word_embeddings.weight")}


def _from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"untie_embeddings_and_output_weights": not given.get("tie_word_embeddings", True)}


BLOOM = Family(
    architecture="BloomForCausalLM",
    prefix="transformer.",
    config_fields=(
        ConfigField("hidden_size", "hidden_size", 64),
        ConfigField("n_layer", "num_layers"),
        ConfigField("n_head", "num_attention_heads"),
        ConfigField("vocab_size", "vocab_size"),
        ConfigField("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        ConfigField("hidden_dropout", "hidden_dropout", 0.0),
        ConfigField("attention_dropout", "attention_dropout", 0.0),
        ConfigField("initializer_range", "init_method_std", 0.02),
        ConfigField("apply_residual_connection_post_layernorm", "apply_residual_connection_post_layernorm", False),
        ConfigField("seq_length", "max_position_embeddings", 2048),
    ),
    aliases={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    constants={"position_embedding_type": "alibi", "embed_layernorm": True, "openai_gelu": True},
    more_from_hf=_from_hf,
    more_to_hf=lambda config: {"tie_word_embeddings": not config.model.untie_embeddings_and_output_weights},
    tied=TIED,
    rules=(Rule("transformer.word_embeddings_layernorm", "embedding_norm"), *RULES),
)
