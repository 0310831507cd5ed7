"""Hugging Face's models at toy size, with random weights: one row for each variant of a family that is converted."""

from collections.abc import Callable
from typing import Any

import transformers

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 80, "initializer_range": 0.1, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def make(kind: str, **more: Any) -> Callable[[], transformers.PreTrainedModel]:
    """What makes the causal model of a kind, such as Llama."""
    return lambda: getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**{**SHAPE, **more})
    )


def gpt2(**more: Any) -> Callable[[], transformers.PreTrainedModel]:
    """As `make`."""
    config = {
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 97,
        "initializer_range": 0.1,
        **more,
    }
    return lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **config))


def bloom(**more: Any) -> Callable[[], transformers.PreTrainedModel]:
    """As `make`."""
    config = {"hidden_size": 48, "n_layer": 3, "n_head": 4, "vocab_size": 97, "initializer_range": 0.1, **more}
    return lambda: transformers.BloomForCausalLM(transformers.BloomConfig(bos_token_id=0, eos_token_id=0, **config))


def t5(**more: Any) -> Callable[[], transformers.PreTrainedModel]:
    """As `make`, without dropout. Its decoder is as deep as its encoder, because transformers' cache takes it to be."""
    config = {
        "vocab_size": 97, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "dropout_rate": 0.0,
        "decoder_start_token_id": 0, **more,
    }  # fmt: skip

    def made() -> transformers.PreTrainedModel:
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
        for weight in {model.shared.weight, model.lm_head.weight}:
            weight.data *= 0.3  # 1 would be right for a wider model
        return model

    return made


def scaled_rope(kind: str, **more: float) -> dict[str, Any]:
    """Rope parameters that matter at 64 positions: their original length is 16."""
    length = {} if kind == "linear" else {"original_max_position_embeddings": 16}
    return {"rope_type": kind, "factor": 4.0, "rope_theta": 100.0, **length, **more}


def bert(kind: str, **more: Any) -> Callable[[], transformers.PreTrainedModel]:
    """As `make`, of a model for pre-training without dropout."""
    config = {**SHAPE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0, **more}
    return lambda: getattr(transformers, f"{kind}ForPreTraining")(getattr(transformers, f"{kind}Config")(**config))


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "gpt2": gpt2(),
    "gpt2, erf, untied": gpt2(activation_function="gelu", n_inner=70, tie_word_embeddings=False),
    "gpt2, relu": gpt2(activation_function="relu"),
    "llama": make("Llama"),
    "llama, groups, tied": make("Llama", num_key_value_heads=2, head_dim=20, tie_word_embeddings=True),
    "llama 3.1": make(
        "Llama", num_key_value_heads=2, rope_parameters=scaled_rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)
    ),
    "llama, linear": make("Llama", rope_parameters=scaled_rope("linear")),
    "llama, yarn": make("Llama", rope_parameters=scaled_rope("yarn")),
    "llama, dynamic": make("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    "mistral": make("Mistral", num_key_value_heads=1, sliding_window=7, head_dim=12),
    "mistral, whole": make("Mistral", num_key_value_heads=2, sliding_window=None, head_dim=12),
    "qwen2": make("Qwen2", num_key_value_heads=2),
    "qwen2, half slides": make(
        "Qwen2", num_key_value_heads=2, use_sliding_window=True, sliding_window=9, max_window_layers=2
    ),
    "qwen3": make("Qwen3", num_key_value_heads=2, head_dim=20),
    "gemma": make("Gemma", num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6),
    "bloom": bloom(),
    "falcon 7b": make("Falcon", ffn_hidden_size=80),
    "falcon 40b": make("Falcon", ffn_hidden_size=80, new_decoder_architecture=True, num_kv_heads=2),
    "falcon, one norm": make(
        "Falcon", ffn_hidden_size=80, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "falcon rw": make("Falcon", ffn_hidden_size=80, alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "neox": make("GPTNeoX", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "neox, one after the other": make(
        "GPTNeoX", use_parallel_residual=False, num_attention_heads=2, intermediate_size=70
    ),
}


def headed(kind: str, **more: Any) -> Callable[[], transformers.PreTrainedModel]:
    """As `bert`, of the class whose name is `kind`."""
    config = getattr(transformers, f"{kind.partition('For')[0]}Config")
    fixed = {**SHAPE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
    return lambda: getattr(transformers, kind)(config(**fixed, **more))


HEADED: dict[str, Callable[[], transformers.PreTrainedModel]] = {  # with classification heads
    "bert classes": headed("BertForSequenceClassification", num_labels=3),
    "bert choices": headed("BertForMultipleChoice", hidden_act="gelu_new"),
    "megatron-bert classes": headed("MegatronBertForSequenceClassification"),
    "megatron-bert choices": headed("MegatronBertForMultipleChoice"),
}

BERTS: dict[str, Callable[[], transformers.PreTrainedModel]] = {  # with their own heads
    "bert": bert("Bert"),
    "bert, tanh": bert("Bert", hidden_act="gelu_new"),
    "megatron-bert": bert("MegatronBert"),
}
