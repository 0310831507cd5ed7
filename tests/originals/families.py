"""Hugging Face's models at toy size, with random weights: one row for each form of a family that is converted."""

from collections.abc import Callable
from typing import Any

import transformers

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64,
    "intermediate_size": 80, "initializer_range": 0.1, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def make(kind: str, **more: Any) -> Callable[[], transformers.PreTrainedModel]:
    """What makes the causal model of a kind, such as Llama."""
    return lambda: getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**SHAPE, **more}))


def gpt2(**more: Any) -> Callable[[], transformers.PreTrainedModel]:
    """As `make`."""
    config = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 97, "initializer_range": 0.1, **more}
    return lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **config))


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "gpt2": gpt2(),
    "gpt2, erf, untied": gpt2(activation_function="gelu", n_inner=70, tie_word_embeddings=False),
    "llama": make("Llama"),
    "llama, groups, tied": make("Llama", num_key_value_heads=2, head_dim=20, tie_word_embeddings=True),
}
