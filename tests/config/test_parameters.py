"""Parameter counts against the published ones, and against the built model."""

import pytest

from megalith.common.errors import ConfigError
from megalith.config.parameters import matrix_parameters, parameter_count, parameter_shapes
from megalith.config.sections.model import ModelConfig

GPT2 = {
    "num_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "max_position_embeddings": 1024,
    "vocab_size": 50257,
}
LLAMA = {
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "vocab_size": 128256,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
}
PUBLISHED = [
    (GPT2, 124_439_808),
    ({**GPT2, "num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16}, 354_823_168),
    ({**GPT2, "num_layers": 36, "hidden_size": 1280, "num_attention_heads": 20}, 774_030_080),
    ({**LLAMA, "num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192}, 1_235_814_400),
    (
        {
            **LLAMA,
            "num_layers": 32,
            "hidden_size": 4096,
            "ffn_hidden_size": 14336,
            "untie_embeddings_and_output_weights": True,
        },
        8_030_261_248,
    ),
    (
        {
            **LLAMA,
            "num_layers": 28,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "kv_channels": 128,
            "ffn_hidden_size": 3072,
            "vocab_size": 151936,
            "qk_layernorm": True,
        },
        596_049_920,
    ),
    (
        {
            **LLAMA,
            "num_layers": 24,
            "hidden_size": 896,
            "num_attention_heads": 14,
            "num_query_groups": 2,
            "ffn_hidden_size": 4864,
            "vocab_size": 151936,
            "add_qkv_bias": True,
        },
        494_032_768,
    ),
]
NAMES = ["gpt2", "gpt2-medium", "gpt2-large", "llama-3.2-1b", "llama-3-8b", "qwen3-0.6b", "qwen2.5-0.5b"]


@pytest.mark.parametrize(("values", "count"), PUBLISHED, ids=NAMES)
def test_published_counts(values, count):
    assert parameter_count(ModelConfig(**values)) == count


def test_what_is_unknown_is_named():
    with pytest.raises(ConfigError, match=r"(?s)--num-layers must be given, .*--vocab-size must be given, "):
        parameter_count(ModelConfig(hidden_size=4, num_attention_heads=1))


SMALL = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "max_position_embeddings": 16, "vocab_size": 31}
FORMS = [
    {},
    {"untie_embeddings_and_output_weights": True},
    {"position_embedding_type": "rope"},
    {"position_embedding_type": "alibi"},
    {"attention_head_type": "multiquery"},
    {"num_query_groups": 2, "kv_channels": 10},
    {"swiglu": True},
    {"glu_activation": "geglu"},
    {"add_bias_linear": False},
    {"add_bias_linear": False, "add_qkv_bias": True},
    {"normalization": "RMSNorm", "qk_layernorm": True},
    {"squared_relu": True, "ffn_hidden_size": 50},
    {"embed_layernorm": True, "position_embedding_type": "alibi"},
    {"parallel_attn": True},
    {"parallel_attn": True, "parallel_layernorm": True},
    {"normalization": "RMSNorm", "apply_layernorm_1p": True},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form) or "gpt2")
def test_equal_to_the_built_model(form):
    import torch

    from megalith.models.gpt import GPT

    config = ModelConfig(**{**SMALL, **form})
    with torch.device("meta"):
        model = GPT(config)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == parameter_shapes(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config)
    matrices = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert sum(matrices.values()) == matrix_parameters(config)


BERTS = [
    {},
    {"norm_after_residual": True},
    {"bert_no_binary_head": True},
    {"untie_embeddings_and_output_weights": True},
    {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "norm_after_residual": True},
]


@pytest.mark.parametrize("form", BERTS, ids=lambda form: "-".join(form) or "megatron")
def test_bert_equal_to_the_built_model(form):
    import torch

    from megalith.models.bert import BERT

    config = ModelConfig(model_type="bert", **{**SMALL, **form})
    with torch.device("meta"):
        model = BERT(config)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == parameter_shapes(config)


def test_bert_base_has_its_published_size():
    shape = {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "vocab_size": 30522,
    }
    assert parameter_count(ModelConfig(model_type="bert", norm_after_residual=True, **shape)) == 110_106_428


T5S = [
    {},
    {"decoder_num_layers": 1},
    {"position_embedding_type": "relative", "normalization": "RMSNorm", "add_bias_linear": False},
    {"swiglu": True, "untie_embeddings_and_output_weights": True, "num_query_groups": 2, "qk_layernorm": True},
]


@pytest.mark.parametrize("form", T5S, ids=lambda form: "-".join(form) or "megatron")
def test_t5_equal_to_the_built_model(form):
    import torch

    from megalith.models.t5 import T5

    config = ModelConfig(model_type="t5", **{**SMALL, **form})
    with torch.device("meta"):
        model = T5(config)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == parameter_shapes(config)
