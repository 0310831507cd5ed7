"""Names that may follow a flag: those of megalith's registries, and those of Megatron's flags that set nothing here."""

import pytest

from megalith.config.architectures import ARCHITECTURES
from megalith.config.checks.checks import find_problems
from megalith.config.flags import flags
from megalith.config.flags.values import fields
from megalith.config.megatron import flags as legacy_megatron
from megalith.config.run import RunConfig
from megalith.data.build import DATASETS
from megalith.data.tokenizers.tokenizer import TOKENIZERS
from megalith.optim.build import OPTIMIZERS
from megalith.training.tasks import TASKS

REGISTRIES = {
    "model_type": ARCHITECTURES,
    "tensor_parallel_plan": ARCHITECTURES,
    "dataset": DATASETS,
    "loss": TASKS,
    "tokenizer_type": TOKENIZERS,
    "optimizer": OPTIMIZERS,
}


@pytest.mark.parametrize("name", [name for name, field in fields().items() if field.metadata["names"]])
def test_names_are_those_of_the_registry(name):
    assert set(fields()[name].metadata["names"]) == set(REGISTRIES[name])


@pytest.mark.parametrize("name", REGISTRIES)
def test_another_name_is_refused_at_the_start_and_ones_own_is_not(name):
    def problems_of(value):
        return [
            each.text for each in find_problems(RunConfig().replace(**{name: value}), data=False) if name in each.fields
        ]

    (text,) = problems_of("foo")
    assert text.startswith(f"--{name.replace('_', '-')} must be one of ")
    assert "or module:name of your own; found 'foo'." in text
    assert problems_of("megalith.config.architectures:GPT" if name == "model_type" else "mine:Thing") == []


def test_a_model_that_is_not_there_is_reported_with_the_rest():
    def problems_of(**values):
        return [each for each in find_problems(RunConfig().replace(**values), data=False) if each.fields]

    problems = problems_of(model_type="mine:Thing", tensor_model_parallel_size=0)
    (text,) = [each.text for each in problems if "model_type" in each.fields]
    assert text.startswith("model 'mine:Thing' cannot be imported") and "Python path" in text
    assert any("tensor_model_parallel_size" in each.fields for each in problems)
    (text,) = [each.text for each in problems_of(model_type="megalith.models.gpt:GPT") if "model_type" in each.fields]
    assert "or a class that carries one as `architecture`" in text


VALUED = [name for name, (nargs, _) in legacy_megatron.not_needed().items() if nargs]


@pytest.mark.parametrize("name", VALUED)
def test_what_follows_a_flag_that_is_not_needed_is_checked(name):
    problems = flags.read([name, "foo"]).problems
    if name in legacy_megatron.PATHS:
        assert problems == []
        return
    (problem,) = problems
    assert problem.text.startswith(f"{name} must be ") and "found 'foo'." in problem.text
    right = legacy_megatron.CHOICES.get(name, ("1", "0.5", "5e8"))
    assert all(flags.read([name, value]).problems == [] for value in right)


def test_no_word_is_listed_for_a_flag_that_is_not_there():
    assert {*legacy_megatron.PATHS, *legacy_megatron.CHOICES} <= set(VALUED)


def test_the_nearest_is_named():
    (problem,) = flags.read(["--DDP-impl", "Locl"]).problems
    assert problem.text == "--DDP-impl must be one of local, torch, FSDP; found 'Locl'. Write --DDP-impl local."
