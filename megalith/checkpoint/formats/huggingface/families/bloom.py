"""Bloom (BigScience, 2022): ALiBi, a norm of the embeddings, q, k and v of each head side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.family import GROUPS, Copy, Family, Rule, Setting

QKV = ("layers.{layer}.attention.q", "layers.{layer}.attention.k", "layers.{layer}.attention.v")
LAYER = (  # also Falcon's
    Rule("transformer.word_embeddings", "embedding"),
    Rule("transformer.h.{layer}.input_layernorm", "layers.{layer}.attention_norm"),
    Rule("transformer.h.{layer}.self_attention.query_key_value", QKV, GROUPS),
    Rule("transformer.h.{layer}.self_attention.dense", "layers.{layer}.attention.out"),
    Rule("transformer.h.{layer}.post_attention_layernorm", "layers.{layer}.mlp_norm"),
    Rule("transformer.h.{layer}.mlp.dense_h_to_4h", "layers.{layer}.mlp.up"),
    Rule("transformer.h.{layer}.mlp.dense_4h_to_h", "layers.{layer}.mlp.down"),
    Rule("transformer.ln_f", "final_norm"),
    Rule("lm_head", "head"),
)
COPIES = {"lm_head.weight": Copy("transformer.word_embeddings.weight")}


def _more_ours(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"untie_embeddings_and_output_weights": not given.get("tie_word_embeddings", True)}


BLOOM = Family(
    architecture="BloomForCausalLM",
    prefix="transformer.",
    settings=(
        Setting("hidden_size", "hidden_size", 64),
        Setting("n_layer", "num_layers"),
        Setting("n_head", "num_attention_heads"),
        Setting("vocab_size", "vocab_size"),
        Setting("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        Setting("hidden_dropout", "hidden_dropout", 0.0),
        Setting("attention_dropout", "attention_dropout", 0.0),
        Setting("initializer_range", "init_method_std", 0.02),
        Setting("apply_residual_connection_post_layernorm", "apply_residual_connection_post_layernorm", False),
        Setting("seq_length", "max_position_embeddings", 2048),
    ),
    aliases={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    always={"position_embedding_type": "alibi", "embed_layernorm": True, "openai_gelu": True},
    more_ours=_more_ours,
    more_theirs=lambda config: {"tie_word_embeddings": not config.model.untie_embeddings_and_output_weights},
    copies=COPIES,
    names=(Rule("transformer.word_embeddings_layernorm", "embedding_norm"), *LAYER),
)
