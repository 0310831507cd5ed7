"""Which fields make another model."""

import dataclasses

import pytest

from megalith.config import identity
from megalith.config.sections.model import ModelConfig

BASE = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64, max_position_embeddings=16)


def test_every_field_is_classified_once():
    """A new field of the model has to be put into the table."""
    listed = [name for fields, _ in identity.IDENTITY for name in fields]
    listed += [*identity.BY_SHAPE, *identity.NOTED, *identity.INDIFFERENT]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(ModelConfig))


@pytest.mark.parametrize(
    ("then", "now", "changes"),
    [
        ({}, {"num_attention_heads": 8}, ["--num-attention-heads is 8, was 4"]),
        ({}, {"hidden_size": 48}, ["--hidden-size is 48, was 32"]),
        (
            {"position_embedding_type": "none"},
            {"position_embedding_type": "alibi"},
            ["--position-embedding-type is alibi, was none"],
        ),
        ({}, {"openai_gelu": True}, []),
        ({"model_type": "bert"}, {"model_type": "bert", "openai_gelu": True}, ["--openai-gelu is True, was False"]),
        ({}, {"bias_gelu_fusion": False}, ["--bias-gelu-fusion is False, was True"]),
        ({"glu_activation": "geglu"}, {"glu_activation": "reglu"}, ["--glu-activation is reglu, was geglu"]),
        (
            {"position_embedding_type": "rope"},
            {"position_embedding_type": "rope", "rotary_interleaved": True},
            ["--rotary-interleaved is True, was False"],
        ),
        ({}, {"rotary_interleaved": True, "rotary_percent": 0.5, "scaled_alibi": True}, []),
        ({}, {"layernorm_epsilon": 1e-6}, ["--layernorm-epsilon is 1e-06, was 1e-05"]),
        ({}, {"softmax_scale": 1.0}, ["--softmax-scale is 1, was None"]),
        ({}, {"softmax_scale": 8**-0.5, "kv_channels": 8, "ffn_hidden_size": 128, "num_query_groups": 4}, []),
        ({"position_embedding_type": "rope"}, {"use_rotary_position_embeddings": True}, []),
        ({"position_embedding_type": "absolute", "normalization": "layernorm"}, {}, []),
        ({"swiglu": True}, {"glu_activation": "swiglu", "ffn_hidden_size": 64}, []),
        ({"attention_head_type": "multiquery"}, {"num_query_groups": 1, "group_query_attention": True}, []),
        ({}, {"init_method_std": 0.01, "attention_backend": "explicit", "make_vocab_size_divisible_by": 1}, []),
    ],
)
def test_another_model_by_what_fields_come_to(then, now, changes):
    """Effects are compared, not spellings; what has no effect in the model is none."""
    found = identity.differences(dataclasses.replace(BASE, **now), dataclasses.replace(BASE, **then))
    assert [identity.change_text(*each) for each in found.incompatible] == changes and found.noted == []


def test_what_may_change_is_reported():
    now = dataclasses.replace(BASE, sliding_window=8, rotary_base=1e6, hidden_dropout=0.0)
    assert identity.differences(now, BASE) == (
        [],
        ["--sliding-window is 8, was None", "--rotary-base is 1000000, was 10000", "--hidden-dropout is 0, was 0.1"],
    )
