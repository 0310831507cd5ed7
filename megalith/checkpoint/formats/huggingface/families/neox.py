"""GPT-NeoX and Pythia (EleutherAI, 2022): rotary positions of a part of each head, attention and MLP side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.families.bloom import QKV
from megalith.checkpoint.formats.huggingface.families.llama import INNER, rope, rope_theirs
from megalith.checkpoint.formats.huggingface.family import (
    GROUPS,
    PLAIN,
    Copy,
    Family,
    Rule,
    Setting,
    activation,
    activation_name,
)
from megalith.checkpoint.formats.huggingface.twice import rope_name, rope_of
from megalith.config.run import RunConfig
from megalith.config.source_fields import checked


def _more_ours(given: Mapping[str, Any]) -> dict[str, Any]:
    found = checked(rope_of(given), INNER, f"config.json: {rope_name(given)}")
    parallel = given.get("use_parallel_residual", True)
    values = rope({**given, "rope_theta": given.get("rotary_emb_base", 10000)})
    return {
        **values,
        **activation(PLAIN, given.get("hidden_act", "gelu")),
        "rotary_percent": found.get("partial_rotary_factor", given.get("rotary_pct", 0.25)),
        "parallel_attn": parallel,
        "parallel_layernorm": parallel,
        "untie_embeddings_and_output_weights": not given.get("tie_word_embeddings", False),
    }


def _more_theirs(config: RunConfig) -> dict[str, Any]:
    m = config.model
    return {
        "rope_scaling": rope_theirs(config)["rope_scaling"],
        "rotary_emb_base": m.rotary_base,
        "rotary_pct": m.rotary_percent,
        "hidden_act": activation_name(PLAIN, m),
        "use_parallel_residual": m.parallel_attn,
        "tie_word_embeddings": not m.untie_embeddings_and_output_weights,
    }


NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    settings=(
        Setting("num_hidden_layers", "num_layers"),
        Setting("hidden_size", "hidden_size"),
        Setting("num_attention_heads", "num_attention_heads"),
        Setting("intermediate_size", "ffn_hidden_size"),
        Setting("max_position_embeddings", "max_position_embeddings", 2048),
        Setting("vocab_size", "vocab_size"),
        Setting("layer_norm_eps", "layernorm_epsilon", 1e-5),
        Setting("hidden_dropout", "hidden_dropout", 0.0),
        Setting("attention_dropout", "attention_dropout", 0.0),
        Setting("initializer_range", "init_method_std", 0.02),
    ),
    always={"position_embedding_type": "rope"},
    only={"attention_bias": (True,)},
    more_ours=_more_ours,
    more_theirs=_more_theirs,
    names=(
        Rule("gpt_neox.embed_in", "embedding"),
        Rule("gpt_neox.layers.{layer}.input_layernorm", "layers.{layer}.attention_norm"),
        Rule("gpt_neox.layers.{layer}.attention.query_key_value", QKV, GROUPS),
        Rule("gpt_neox.layers.{layer}.attention.dense", "layers.{layer}.attention.out"),
        Rule("gpt_neox.layers.{layer}.post_attention_layernorm", "layers.{layer}.mlp_norm"),
        Rule("gpt_neox.layers.{layer}.mlp.dense_h_to_4h", "layers.{layer}.mlp.up"),
        Rule("gpt_neox.layers.{layer}.mlp.dense_4h_to_h", "layers.{layer}.mlp.down"),
        Rule("gpt_neox.final_layer_norm", "final_norm"),
        Rule("embed_out", "head"),
    ),
    in_memory={"lm_head.weight": "embed_out.weight"},
    copies={"embed_out.weight": Copy("gpt_neox.embed_in.weight")},
    surplus=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
