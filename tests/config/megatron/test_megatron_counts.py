"""Megatron's numbers for models whose logs are known, and our own count where nothing is padded or split."""

import pytest

from megalith.config.megatron.counts import padded_vocabulary, rank_parameters, report
from megalith.config.parameters import parameter_count
from megalith.config.run import RunConfig

GPT2_LARGE = RunConfig().replace(
    num_layers=36,
    hidden_size=1280,
    num_attention_heads=20,
    max_position_embeddings=1024,
    seq_length=1024,
    vocab_size=50257,
)


@pytest.mark.parametrize(
    ("size", "tensor", "padded"),
    [
        (50257, 1, 50304),
        (50257, 2, 50432),
        (50257, 4, 50688),
        (50257, 8, 51200),
        (30522, 1, 30592),
        (32000, 1, 32000),
        (32000, 8, 32768),
    ],
)
def test_padded_vocabularies_of_megatrons_logs(size: int, tensor: int, padded: int) -> None:
    assert padded_vocabulary(size, 128, tensor) == padded


def test_gpt2_large_on_two_by_two() -> None:
    config = GPT2_LARGE.replace(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, pipeline_split="even")
    assert report(config) == [
        " > padded vocab (size: 50257) with 175 dummy tokens (new size: 50432)",
        " > number of parameters on (tensor, pipeline) model parallel rank (0, 0): 210753280",
        " > number of parameters on (tensor, pipeline) model parallel rank (1, 0): 210753280",
        " > number of parameters on (tensor, pipeline) model parallel rank (0, 1): 209445120",
        " > number of parameters on (tensor, pipeline) model parallel rank (1, 1): 209445120",
    ]


FORMS: list[dict] = [
    {},
    {"untie_embeddings_and_output_weights": True, "swiglu": True, "add_bias_linear": False, "normalization": "RMSNorm"},
    {"attention_head_type": "multiquery", "position_embedding_type": "alibi", "qk_layernorm": True},
    {
        "num_query_groups": 4,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "position_embedding_type": "rope",
        "ffn_hidden_size": 4000,
    },
]


@pytest.mark.parametrize("form", FORMS)
def test_one_process_without_padding_has_our_count(form: dict) -> None:
    config = GPT2_LARGE.replace(vocab_size=50304, **form)
    assert rank_parameters(config, 0) == parameter_count(config.model)


def test_of_bert_only_the_vocabulary_is_reported():
    config = RunConfig().replace(
        model_type="bert",
        num_layers=2,
        hidden_size=8,
        num_attention_heads=1,
        vocab_size=30522,
        tensor_model_parallel_size=2,
    )
    assert report(config) == [" > padded vocab (size: 30522) with 198 dummy tokens (new size: 30720)"]
