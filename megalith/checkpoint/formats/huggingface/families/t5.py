"""T5 (Raffel et al., 2020), v1.1, Flan and mT5: T5ForConditionalGeneration and MT5ForConditionalGeneration."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.family import (
    REFUSE,
    ConfigField,
    Family,
    Rule,
    TiedTo,
    activation_fields,
    activation_name,
)
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.common.errors import CheckpointError, problem
from megalith.config.run import RunConfig

T5_ACTIVATIONS: dict[str, dict[str, Any]] = {  # feed_forward_proj
    "relu": {"relu": True}, "gated-gelu": {"glu_activation": "geglu_tanh"}, "gated-silu": {"swiglu": True},
    "gated-relu": {"glu_activation": "reglu"}, "gelu": {"bias_gelu_fusion": False}, "gelu_new": {"openai_gelu": True},
}  # fmt: skip


def _from_hf(given: Mapping[str, Any], scales: bool) -> dict[str, Any]:
    """scales: whether the decoder's outputs may be scaled before the head (T5), or never are (mT5)."""
    tied, rate = given.get("tie_word_embeddings", True), given.get("dropout_rate", 0.1)
    return {
        **activation_fields(T5_ACTIVATIONS, given.get("feed_forward_proj", "relu")),
        "untie_embeddings_and_output_weights": not tied,
        # Before transformers 5 the outputs of models with tied embeddings were scaled.
        "scale_output": scales and bool(given.get("scale_decoder_outputs", tied)),
        "hidden_dropout": rate,
        "attention_dropout": rate,
        "max_position_embeddings": given.get("n_positions", 512),  # the length in training; the model has no limit
    }


def _to_hf(config: RunConfig, scales: bool) -> dict[str, Any]:
    m = config.model
    fields = {
        "feed_forward_proj": activation_name(T5_ACTIVATIONS, m),
        "tie_word_embeddings": not m.untie_embeddings_and_output_weights,
    }
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    scaling = {"scale_decoder_outputs": m.scale_output} if scales else {}
    return fields | ids | {"dropout_rate": m.hidden_dropout, **scaling}


def _require_decoder(found: Mapping[str, Lazy]) -> dict[str, Any]:
    """No fields. Raises CheckpointError for a folder that has the encoder alone."""
    if not any(name.startswith("decoder.") for name in found):
        rule = "must be of an encoder and a decoder, and this folder has no decoder (T5EncoderModel)"
        cure = "Convert the whole model that the encoder was taken from"
        raise CheckpointError(problem("The weights", sorted(found)[:3], rule, cure))
    return {}


def _layer_rules(stack: str, mlp: int) -> list[Rule]:
    """Rules of a layer of a stack (encoder or decoder). mlp: the number of the MLP among the layer's sublayers."""
    block = f"{stack}.block.{{layer}}.layer"
    attentions = {"attention": f"{block}.0.SelfAttention", "cross_attention": f"{block}.1.EncDecAttention"}
    norms = {"attention_norm": f"{block}.0", "cross_norm": f"{block}.1", "mlp_norm": f"{block}.{mlp}"}
    mlps = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    names = {
        f"{module}.{linear}": f"{hf_module}.{linear[0]}"
        for module, hf_module in attentions.items()
        for linear in ("q", "k", "v", "out")
    }
    names |= {module: f"{hf_module}.layer_norm" for module, hf_module in norms.items()}
    rules = [Rule(hf_module, f"layers.{{layer}}.{module}", stack=stack) for module, hf_module in names.items()]
    for module, hf_module in mlps.items():
        dense = f"{block}.{mlp}.DenseReluDense.{hf_module}"
        gated = Rule(dense, f"layers.{{layer}}.mlp.{module}", when=lambda model: model.gated, stack=stack)
        ungated = gated._replace(hf_module=dense.replace("wi_1", "wi"), when=lambda model: not model.gated)
        rules += [gated, ungated]
    return rules


_family = functools.partial(
    Family,
    model_types=("t5",),
    config_fields=(
        ConfigField("num_layers", "num_layers"),
        ConfigField("num_decoder_layers", "decoder_num_layers", None),
        ConfigField("d_model", "hidden_size"),
        ConfigField("num_heads", "num_attention_heads"),
        ConfigField("d_kv", "kv_channels", 64),
        ConfigField("d_ff", "ffn_hidden_size"),
        ConfigField("vocab_size", "vocab_size"),
        ConfigField("layer_norm_epsilon", "layernorm_epsilon", 1e-6),
        ConfigField("initializer_factor", "initializer_factor", 1.0),
        ConfigField("relative_attention_num_buckets", "relative_attention_num_buckets", 32),
        ConfigField("relative_attention_max_distance", "relative_attention_max_distance", 128),
    ),
    aliases={
        "hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
    constants={
        "position_embedding_type": "relative", "normalization": "RMSNorm",
        "add_bias_linear": False, "softmax_scale": 1.0,
    },
    config_from_tensors=_require_decoder,
    rules=(
        Rule("shared", "embedding"),
        *_layer_rules("encoder", 1),
        *_layer_rules("decoder", 2),
        Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "encoder_bias"),
        Rule("decoder.block.0.layer.0.SelfAttention.relative_attention_bias", "decoder_bias"),
        Rule("encoder.final_layer_norm", "encoder_norm"),
        Rule("decoder.final_layer_norm", "final_norm"),
        Rule("lm_head", "head"),
    ),
    tied={  # transformers 5 writes that the head is tied even where it is not: a note says so, and the two stay two
        "encoder.embed_tokens.weight": TiedTo("shared.weight", REFUSE),
        "decoder.embed_tokens.weight": TiedTo("shared.weight", REFUSE),
        "lm_head.weight": TiedTo("shared.weight"),
    },
    # A tensor of the first files, which no model uses.
    ignored=(r".*\.EncDecAttention\.relative_attention_bias\.weight",),
)  # fmt: skip
T5 = _family(
    architecture="T5ForConditionalGeneration",
    more_from_hf=functools.partial(_from_hf, scales=True),
    more_to_hf=functools.partial(_to_hf, scales=True),
)
MT5 = _family(
    architecture="MT5ForConditionalGeneration",
    more_from_hf=functools.partial(_from_hf, scales=False),
    more_to_hf=functools.partial(_to_hf, scales=False),
)
