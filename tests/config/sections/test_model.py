"""What follows from a model's own fields."""

import pytest

from megalith.config.flags.loading import from_yaml, load_config, to_yaml
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig

SMALL = "gpt --num-layers 2 --hidden-size 8 --num-attention-heads 2 --vocab-size 9 --seq-length 8"
SMALL += " --micro-batch-size 1 --train-iters 1 --lr 1"


@pytest.mark.parametrize(
    ("flags", "mlp", "head"),
    [  # what Megatron computes for these flags, in the MLP and in BERT's head over the vocabulary
        ("", "gelu_tanh", "gelu"),
        ("--no-bias-gelu-fusion", "gelu", "gelu"),
        ("--openai-gelu", "gelu_tanh", "gelu_tanh"),
        ("--openai-gelu --no-bias-gelu-fusion", "gelu_tanh", "gelu_tanh"),
        ("--disable-bias-linear --no-bias-gelu-fusion", "gelu", "gelu"),
        ("--disable-bias-linear --openai-gelu", "gelu_tanh", "gelu_tanh"),
        ("--swiglu", "swiglu", "gelu"),
        ("--squared-relu", "squared_relu", "gelu"),
    ],
)
def test_gelu_is_what_megatron_computes(flags, mlp, head):
    config, notices = load_config([*SMALL.split(), *flags.split()], data=False)
    assert (config.model.activation, config.model.head_activation) == (mlp, head)
    assert not [line for line in notices if "GELU" in line]


def test_gelu_without_biases_is_reported():
    """Megatron refuses it unless --no-bias-gelu-fusion is given."""
    config, notices = load_config([*SMALL.split(), "--disable-bias-linear"], data=False)
    assert config.model.activation == "gelu"
    assert [line for line in notices if "erf" in line and "--no-bias-gelu-fusion" in line]


@pytest.mark.parametrize(("openai", "activation"), [(False, "gelu"), (True, "gelu_tanh")])
def test_a_config_stored_before_the_fusion_was_a_field_keeps_its_gelu(openai, activation, tmp_path):
    text = to_yaml(RunConfig().replace(openai_gelu=openai)).replace("  bias_gelu_fusion: true\n", "")
    assert "bias_gelu_fusion" not in text
    assert from_yaml(text).model.activation == activation
    (tmp_path / "old.yaml").write_text(text)
    config, notices = load_config([*SMALL.split(), "--config", str(tmp_path / "old.yaml")], data=False)
    assert config.model.activation == activation
    assert any("openai_gelu: false" in line for line in notices) == (not openai)


def test_the_activation_of_a_fresh_config():
    assert ModelConfig().activation == "gelu_tanh" and from_yaml("num_layers: 2").model.activation == "gelu_tanh"
