"""Every recipe resolves, passes all checks on the processes it names, and has the parameters it says."""

import pytest

from megalith import recipes
from megalith.common.errors import ConfigError
from megalith.config.batch_math import data_parallel_size, total_steps
from megalith.config.flags.loading import load_config
from megalith.config.parameters import parameter_count
from megalith.planner.flops import flops_per_token


def load(name, **options):
    corpus = [] if "data_file_list" in recipes.text(name) else ["--data-path", "a"]
    return load_config(["--recipe", name, *corpus, "--tokenizer-model", "t"], read_recipe=recipes.text, **options)[0]


FAMILIES = {  # of the list -> its recipes
    "gpt2": {"gpt2-small-124m", "gpt2-345m", "gpt2-tiny", "cpu-tiny"},
    "gpt3": {"gpt3-1.3b", "gpt3-2.7b", "gpt3-175b", "gpt3-tiny"},
    "megatron": {
        f"megatron-gpt-{size}"
        for size in ("1.7b", "3.6b", "7.5b", "18b", "39b", "76b", "145b", "310b", "530b", "1t", "tiny")
    },
    "bert": {"bert-345m", "bert-tiny"},
    "t5": {"t5-base", "t5-tiny"},
    "llama": {"llama-3.2-1b", "llama-3-8b", "llama-3-70b", "llama-3-405b", "llama-3-tiny"},
    "qwen3": {"qwen3-0.6b", "qwen3-8b", "qwen3-tiny"},
    "tinyllama": {"tinyllama-1.1b-continued", "tinyllama-tiny-continued"},
}


def test_the_list():
    assert set.union(*FAMILIES.values()) == set(recipes.names())


@pytest.mark.parametrize("name", recipes.names())
def test_each_recipe(name):
    about = recipes.about(recipes.text(name))
    config = load(name, world_size=about["processes"])
    assert set(about) == {"summary", "source", "published", "processes", "vocab_size", "parameters"}
    assert config.logging.name == name and "\n  model_type: " in recipes.text(name)
    model = config.replace(vocab_size=about["vocab_size"]).model
    assert parameter_count(model) == about["parameters"]
    assert flops_per_token(model, config.data.seq_length) > 6 * (
        about["parameters"] - model.vocab_size * model.hidden_size
    )
    assert total_steps(config, data_parallel_size(config, about["processes"])) > 100
    assert config.optimizer.min_lr == pytest.approx(config.optimizer.lr / 10, rel=0.5)


@pytest.mark.parametrize("name", recipes.names())
def test_each_size_is_the_published_one(name):
    """To the digits that are published: 1.3 billion may be 1.26 to 1.34, and a count to the last digit is exact."""
    about = recipes.about(recipes.text(name))
    published = about["published"]
    digits = len(str(published).rstrip("0"))
    unit = 10 ** (len(str(published)) - digits) if published % 10**6 == 0 else 0
    assert abs(about["parameters"] - published) <= unit, published


def test_continued_training_has_a_list_of_files():
    for name in FAMILIES["tinyllama"]:
        processes = recipes.about(recipes.text(name))["processes"]
        assert load(name, world_size=processes).data.data_file_list == "data_list.txt"


def test_ramp_up_of_gpt3():
    assert load("gpt3-175b", world_size=1024).batch.rampup_batch_size == [16, 16, 5859375]
    assert load("gpt3-tiny").batch.rampup_batch_size == [8, 8, 2000]


LARGE = ("39b", "76b", "145b", "310b", "530b", "1t", "405b")  # seconds each, for their thousands of modules


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith(LARGE)) for name in recipes.names()]
)
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
