"""Every recipe resolves, passes all checks on the processes it names, and has the parameters it says."""

import pytest

from megalith import recipes
from megalith.common.errors import ConfigError
from megalith.config.batch_math import data_parallel_size, total_steps
from megalith.config.flags.loading import load_config
from megalith.config.parameters import parameter_count
from megalith.planner.flops import flops_per_token


def load(name, **options):
    return load_config(
        ["--recipe", name, "--data-path", "a", "--tokenizer-model", "t"], read_recipe=recipes.text, **options
    )[0]


def test_the_list():
    assert {
        "cpu-tiny",
        "gpt2-small-124m",
        "gpt2-medium-345m",
        "gpt3-1.3b",
        "gpt3-2.7b",
        "gpt3-175b",
        "llama-1b",
        "llama-8b",
        "bert-tiny",
        "t5-tiny",
    } <= set(recipes.names())


@pytest.mark.parametrize("name", recipes.names())
def test_each_recipe(name):
    about = recipes.about(recipes.text(name))
    config = load(name, world_size=about["processes"])
    assert set(about) == {"summary", "processes", "vocab_size", "parameters"}
    assert config.logging.name == name and "\n  model_type: " in recipes.text(name)
    model = config.replace(vocab_size=about["vocab_size"]).model
    assert parameter_count(model) == about["parameters"]
    assert flops_per_token(model, config.data.seq_length) > 6 * (
        about["parameters"] - model.vocab_size * model.hidden_size
    )
    assert total_steps(config, data_parallel_size(config, about["processes"])) > 100


@pytest.mark.parametrize("name", recipes.names())
def test_each_recipe_builds_on_the_meta_device(name):
    import torch

    about = recipes.about(recipes.text(name))
    config = load(name, world_size=about["processes"]).replace(vocab_size=about["vocab_size"])
    with torch.device("meta"):
        model = config.model.architecture.find("model")(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == about["parameters"]


def test_gpt3_175b_counts_steps_as_megatron():
    assert total_steps(load("gpt3-175b", world_size=1024), 8) == 111354


def test_unknown_recipe():
    with pytest.raises(ConfigError, match="unknown recipe gpt2-smal: did you mean gpt2-small-124m"):
        recipes.text("gpt2-smal")
    with pytest.raises(
        ConfigError, match=r"^unknown recipe ../config: the known ones are bert-345m, bert-tiny, cpu-tiny, "
    ):
        load("../config")
