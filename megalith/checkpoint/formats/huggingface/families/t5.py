"""T5 (Raffel et al., 2020), v1.1, Flan and mT5: transformers' T5ForConditionalGeneration and MT5ForConditionalGeneration."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.family import (
    REFUSE,
    Copy,
    Family,
    Rule,
    Setting,
    activation,
    activation_name,
)
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.common.errors import CheckpointError, problem
from megalith.config.run import RunConfig

MLPS: dict[str, dict[str, Any]] = {  # feed_forward_proj
    "relu": {"relu": True}, "gated-gelu": {"glu_activation": "geglu_tanh"}, "gated-silu": {"swiglu": True},
    "gated-relu": {"glu_activation": "reglu"}, "gelu": {"bias_gelu_fusion": False}, "gelu_new": {"openai_gelu": True},
}  # fmt: skip


def _more_ours(given: Mapping[str, Any], scales: bool) -> dict[str, Any]:
    tied, rate = given.get("tie_word_embeddings", True), given.get("dropout_rate", 0.1)
    return {
        **activation(MLPS, given.get("feed_forward_proj", "relu")),
        "untie_embeddings_and_output_weights": not tied,
        "scale_output": scales
        and bool(given.get("scale_decoder_outputs", tied)),  # before transformers 5 tied ones were scaled
        "hidden_dropout": rate,
        "attention_dropout": rate,
        "max_position_embeddings": given.get("n_positions", 512),  # no limit of the model, but what it was trained on
    }


def _more_theirs(config: RunConfig, scales: bool) -> dict[str, Any]:
    m = config.model
    made = {
        "feed_forward_proj": activation_name(MLPS, m),
        "tie_word_embeddings": not m.untie_embeddings_and_output_weights,
    }
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return (
        made | ids | {"dropout_rate": m.hidden_dropout, **({"scale_decoder_outputs": m.scale_output} if scales else {})}
    )


def _whole(found: Mapping[str, Lazy]) -> dict[str, Any]:
    """Nothing, of a folder with both stacks."""
    if not any(name.startswith("decoder.") for name in found):
        rule = "a T5 has an encoder and a decoder here, and this folder has no decoder (T5EncoderModel)"
        raise CheckpointError(
            problem("weights", sorted(found)[:3], rule, "Convert the whole model that the encoder was taken from")
        )
    return {}


def _layer(stack: str, mlp: int) -> list[Rule]:
    """Rules of a layer of a stack; mlp: the number of its MLP among the parts of a layer."""
    block = f"{stack}.block.{{layer}}.layer"
    attentions = {"attention": f"{block}.0.SelfAttention", "cross_attention": f"{block}.1.EncDecAttention"}
    norms = {"attention_norm": f"{block}.0", "cross_norm": f"{block}.1", "mlp_norm": f"{block}.{mlp}"}
    mlps = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    names = {
        f"{ours}.{end}": f"{theirs}.{end[0]}" for ours, theirs in attentions.items() for end in ("q", "k", "v", "out")
    }
    names |= {ours: f"{theirs}.layer_norm" for ours, theirs in norms.items()}
    rules = [Rule(theirs, f"layers.{{layer}}.{ours}", stack=stack) for ours, theirs in names.items()]
    for ours, theirs in mlps.items():
        dense = f"{block}.{mlp}.DenseReluDense.{theirs}"
        gated = Rule(dense, f"layers.{{layer}}.mlp.{ours}", when=lambda model: model.gated, stack=stack)
        plain = gated._replace(theirs=gated.theirs.replace("wi_1", "wi"), when=lambda model: not model.gated)
        rules += [gated, plain]
    return rules


_make = functools.partial(
    Family,
    models=("t5",),
    settings=(
        Setting("num_layers", "num_layers"),
        Setting("num_decoder_layers", "decoder_num_layers", None),
        Setting("d_model", "hidden_size"),
        Setting("num_heads", "num_attention_heads"),
        Setting("d_kv", "kv_channels", 64),
        Setting("d_ff", "ffn_hidden_size"),
        Setting("vocab_size", "vocab_size"),
        Setting("layer_norm_epsilon", "layernorm_epsilon", 1e-6),
        Setting("initializer_factor", "initializer_factor", 1.0),
        Setting("relative_attention_num_buckets", "relative_attention_num_buckets", 32),
        Setting("relative_attention_max_distance", "relative_attention_max_distance", 128),
    ),
    aliases={"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers", "head_dim": "d_kv"},
    always={
        "position_embedding_type": "relative", "normalization": "RMSNorm",
        "add_bias_linear": False, "softmax_scale": 1.0,
    },
    of_tensors=_whole,
    names=(
        Rule("shared", "embedding"),
        *_layer("encoder", 1),
        *_layer("decoder", 2),
        Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "encoder_bias"),
        Rule("decoder.block.0.layer.0.SelfAttention.relative_attention_bias", "decoder_bias"),
        Rule("encoder.final_layer_norm", "encoder_norm"),
        Rule("decoder.final_layer_norm", "final_norm"),
        Rule("lm_head", "head"),
    ),
    copies={  # transformers 5 writes that the head is tied even where there are two: that is told, and they are two
        "encoder.embed_tokens.weight": Copy("shared.weight", REFUSE), "decoder.embed_tokens.weight": Copy("shared.weight", REFUSE),
        "lm_head.weight": Copy("shared.weight"),
    },
    # A table of the first files that nothing reads.
    surplus=(r".*\.EncDecAttention\.relative_attention_bias\.weight",),
)  # fmt: skip
T5 = _make(
    architecture="T5ForConditionalGeneration",
    more_ours=functools.partial(_more_ours, scales=True),
    more_theirs=functools.partial(_more_theirs, scales=True),
)
MT5 = _make(
    architecture="MT5ForConditionalGeneration",
    more_ours=functools.partial(_more_ours, scales=False),
    more_theirs=functools.partial(_more_theirs, scales=False),
)
