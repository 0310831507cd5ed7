"""A model's parameters, from its config alone: their names, their shapes, how many there are."""

from __future__ import annotations

import math
import re

from megalith.common.registry import Registry
from megalith.config.model import ModelConfig
from megalith.config.text import fail, flag, trouble

Shapes = dict[str, tuple[int, ...]]
SHAPES = Registry("model", {name: f"megalith.config.parameters:{name}_shapes" for name in ("gpt", "bert", "t5")})


def sizes(model: ModelConfig) -> tuple[int, int, int, int]:
    """(layers, hidden size, query heads, true vocabulary size). Raises ConfigError where one is not known."""
    names = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
    layers, hidden, heads, vocabulary = (getattr(model, name) for name in names)
    fail(trouble((name,), flag(name), None, "the size of a model depends on it", f"Write {flag(name)} N").text
         for name in names if getattr(model, name) is None)  # fmt: skip
    return layers, hidden, heads, vocabulary


def matrix_parameters(model: ModelConfig) -> int:
    """Elements of the weight matrices that each token is multiplied with: all layers and the output layer, no biases."""
    layers, h, _, vocabulary = sizes(model)
    matrices = layers * (attention_parameters(model) + mlp_parameters(model)) + vocabulary * h
    return matrices + (h * h if model.model_type == "bert" else 0)  # of its head, a layer before


def attention_parameters(model: ModelConfig) -> int:
    """Elements of the weight matrices of an attention."""
    _, h, heads, _ = sizes(model)
    return 2 * h * model.head_dim * (heads + model.num_kv_heads)  # q and out; k and v


def mlp_parameters(model: ModelConfig) -> int:
    """Elements of the weight matrices of an MLP."""
    return (3 if model.gated else 2) * sizes(model)[1] * model.ffn_size


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters, each shared one once, at the true vocabulary size. Needs vocab_size."""
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())


def parameter_shapes(model: ModelConfig) -> Shapes:
    """{parameter: shape}, in the names of a checkpoint (`model/` before them there); a shared one once. Needs vocab_size."""
    return SHAPES.find(model.model_type)(model)


def gpt_shapes(model: ModelConfig) -> Shapes:
    """Those of a GPT (models/gpt.py)."""
    layers, h, heads, vocabulary = sizes(model)
    found: Shapes = {"embedding.weight": (vocabulary, h)}
    if model.positions == "learned_absolute":
        found["position_embedding.weight"] = (model.max_position_embeddings or 0, h)
    if model.embed_layernorm:
        found |= norm_shapes("embedding_norm", model)
    for number in range(layers):
        found |= {f"layers.{number}.{name}": shape for name, shape in layer_shapes(model, heads).items()}
    found |= norm_shapes("final_norm", model)
    if model.untie_embeddings_and_output_weights:
        found["head.weight"] = (vocabulary, h)
    return found


def bert_shapes(model: ModelConfig) -> Shapes:
    """Those of a BERT (models/bert.py)."""
    _, h, _, vocabulary = sizes(model)
    found = gpt_shapes(model)
    if model.norm_after_residual:
        found = {name: shape for name, shape in found.items() if "final_norm" not in name} | norm_shapes("embedding_norm", model)
    found |= {"head_dense.weight": (h, h), "head_dense.bias": (h,), "head.bias": (vocabulary,)} | norm_shapes("head_norm", model)
    if not model.bert_no_binary_head:
        found |= {"token_type_embedding.weight": (2, h), "pooler.weight": (h, h), "pooler.bias": (h,)}
        found |= {"order_head.weight": (2, h), "order_head.bias": (2,)}
    return found


def t5_shapes(model: ModelConfig) -> Shapes:
    """Those of a T5 (models/t5.py)."""
    layers, _, heads, vocabulary = sizes(model)
    found = gpt_shapes(model) | norm_shapes("encoder_norm", model)
    for number in range(layers, model.all_layers):
        own = layer_shapes(model, heads) | norm_shapes("cross_norm", model)
        own |= {name.replace("attention", "cross_attention"): shape for name, shape in own.items() if re.match(r"attention\.\w+\.", name)}
        found |= {f"layers.{number}.{name}": shape for name, shape in own.items() if not re.match(r"cross_attention\.\w_norm", name)}
    if model.positions == "relative":
        found |= {f"{stack}_bias.weight": (model.relative_attention_num_buckets, heads) for stack in ("encoder", "decoder")}
    return found | ({"head.bias": (vocabulary,)} if model.add_bias_linear else {})


def layer_shapes(model: ModelConfig, heads: int) -> Shapes:
    """Those of one layer (layers/block.py)."""
    h, inner, queries, keys = model.hidden_size, model.ffn_size, heads * model.head_dim, model.num_kv_heads * model.head_dim
    bias, qkv_bias = model.add_bias_linear, model.add_bias_linear or model.add_qkv_bias
    linears = {
        "attention.q": (queries, h, qkv_bias), "attention.k": (keys, h, qkv_bias), "attention.v": (keys, h, qkv_bias),
        "attention.out": (h, queries, bias), "mlp.up": (inner, h, bias), "mlp.down": (h, inner, bias),
    }  # fmt: skip
    if model.gated:
        linears["mlp.gate"] = (inner, h, bias)
    found: Shapes = norm_shapes("attention_norm", model) | (norm_shapes("mlp_norm", model) if model.two_norms else {})
    for name, (outputs, inputs, biased) in linears.items():
        found |= {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if biased else {})
    if model.qk_layernorm:
        found |= {f"attention.{name}_norm.weight": (model.head_dim,) for name in "qk"}
    return found


def norm_shapes(name: str, model: ModelConfig) -> Shapes:
    """Those of a norm of the residual stream."""
    kinds = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
    return {f"{name}.{kind}": (model.hidden_size,) for kind in kinds}
