"""How many parameters a model has, from its config alone."""

from __future__ import annotations

from megalith.config.model import ModelConfig
from megalith.config.text import fail, flag, trouble


def sizes(model: ModelConfig) -> tuple[int, int, int, int]:
    """(layers, hidden size, query heads, true vocabulary size). Raises ConfigError where one is not known."""
    names = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
    layers, hidden, heads, vocabulary = (getattr(model, name) for name in names)
    fail(trouble((name,), flag(name), None, "the size of a model depends on it", f"Write {flag(name)} N").text
         for name in names if getattr(model, name) is None)  # fmt: skip
    return layers, hidden, heads, vocabulary


def matrix_parameters(model: ModelConfig) -> int:
    """Elements of the weight matrices that each token is multiplied with: all layers and the output layer, no biases."""
    layers, h, heads, vocabulary = sizes(model)
    attention = 2 * h * model.head_dim * (heads + model.num_kv_heads)  # q and out; k and v
    mlp = (3 if model.gated else 2) * h * model.ffn_size
    return layers * (attention + mlp) + vocabulary * h


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters of a GPT, each shared one once, at the true vocabulary size. Needs vocab_size."""
    layers, h, heads, vocabulary = sizes(model)
    queries, keys = heads * model.head_dim, model.num_kv_heads * model.head_dim
    norm = h if model.norm == "rmsnorm" else 2 * h
    per_layer = 2 * norm + (2 * model.head_dim if model.qk_layernorm else 0)
    if model.add_bias_linear or model.add_qkv_bias:
        per_layer += queries + 2 * keys
    if model.add_bias_linear:
        per_layer += h + (2 if model.gated else 1) * model.ffn_size + h
    embeddings = vocabulary * h if model.untie_embeddings_and_output_weights else 0
    if model.positions == "learned_absolute":
        embeddings += (model.max_position_embeddings or 0) * h
    return matrix_parameters(model) + layers * per_layer + norm + embeddings
