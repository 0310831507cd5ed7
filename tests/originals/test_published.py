"""config.json files with their published values: each builds, without memory, to its published number of parameters."""

import pytest

from megalith.checkpoint.formats.huggingface.family import FAMILIES
from megalith.config.checks.model import model_problems
from megalith.config.parameters import parameter_count
from megalith.config.run import RunConfig
from megalith.runtime.build import meta_model

PUBLISHED = {
    "gpt2-xl": (1_557_611_200, {
        "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 1600,
        "n_head": 25,
        "n_layer": 48, "n_positions": 1024, "output_past": True, "resid_pdrop": 0.1, "vocab_size": 50257,
    }),
    "Llama-3-8B": (8_030_261_248, {
        "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    }),
    "Llama-3.2-1B": (1_235_814_400, {
        "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
                         "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
    }),
    "Mistral-7B-v0.1": (7_241_732_096, {
        "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False, "vocab_size": 32000,
    }),
    "Qwen2.5-0.5B": (494_032_768, {
        "model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    }),
    "Qwen3-8B": (8_190_735_360, {
        "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
        "max_window_layers": 36, "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }),
    "falcon-7b": (6_921_720_704, {
        "model_type": "falcon", "alibi": False, "attention_dropout": 0.0, "bias": False, "bos_token_id": 11,
        "eos_token_id": 11,
        "hidden_dropout": 0.0, "hidden_size": 4544, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "multi_query": True,
        "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32, "parallel_attn": True,
        "vocab_size": 65024,
    }),
    "bloom-560m": (559_214_592, {
        "model_type": "bloom", "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_embed": 1024, "n_layer": 24,
        "num_attention_heads": 16, "n_head": 16,
        "vocab_size": 250880,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_builds_to_its_published_size(name: str) -> None:
    count, given = PUBLISHED[name]
    values = FAMILIES.find(given["model_type"]).config_from_hf(given)
    config = RunConfig().replace(**values, seq_length=1024)
    assert list(model_problems(config)) == []
    model = meta_model(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == count == parameter_count(config.model)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_windows_and_scaled_positions_are_read() -> None:
    mistral = FAMILIES.find("mistral").config_from_hf(PUBLISHED["Mistral-7B-v0.1"][1])
    assert mistral["sliding_window"] == 4096 and mistral["full_attention_layers"] == []
    qwen = FAMILIES.find("qwen3").config_from_hf(PUBLISHED["Qwen3-8B"][1])
    assert "sliding_window" not in qwen and qwen["qk_layernorm"]
    llama = FAMILIES.find("llama").config_from_hf(PUBLISHED["Llama-3.2-1B"][1])
    assert llama["rope_scaling_type"] == "llama3" and llama["rope_scaling_factor"] == 32.0
