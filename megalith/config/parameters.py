"""How many parameters a model has, from its config alone."""

from __future__ import annotations

from megalith.common.errors import ConfigError, problem
from megalith.config.model import ModelConfig


def matrix_parameters(model: ModelConfig) -> int:
    """Elements of the weight matrices that each token is multiplied with: all layers and the output layer, no biases."""
    h = model.hidden_size
    attention = 2 * h * model.head_dim * (model.num_attention_heads + model.num_kv_heads)  # q and out; k and v
    mlp = (3 if model.gated else 2) * h * model.ffn_size
    return model.num_layers * (attention + mlp) + _vocabulary(model) * h


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters of a GPT, each shared one once, at the true vocabulary size. Needs vocab_size."""
    h, d, layers = model.hidden_size, model.head_dim, model.num_layers
    queries, keys = model.num_attention_heads * d, model.num_kv_heads * d
    norm = h if model.norm == "rmsnorm" else 2 * h
    per_layer = 2 * norm + (2 * d if model.qk_layernorm else 0)
    if model.add_bias_linear or model.add_qkv_bias:
        per_layer += queries + 2 * keys
    if model.add_bias_linear:
        per_layer += h + (2 if model.gated else 1) * model.ffn_size + h
    embeddings = _vocabulary(model) * h if model.untie_embeddings_and_output_weights else 0
    if model.positions == "learned_absolute":
        embeddings += model.max_position_embeddings * h
    return matrix_parameters(model) + layers * per_layer + norm + embeddings


def _vocabulary(model: ModelConfig) -> int:
    if model.vocab_size is None:
        raise ConfigError(problem("--vocab-size", None, "the size of a model depends on it", "Write it, or name the tokenizer's files"))
    return model.vocab_size
