"""Words that a flag may be followed by: those of our registries, and those of Megatron's flags that set nothing here."""

import pytest

from megalith.config import flags, legacy_megatron
from megalith.config.checks import find_problems
from megalith.config.loading_values import fields
from megalith.config.run import RunConfig
from megalith.data.build import DATASETS
from megalith.data.tokenizers import TOKENIZERS
from megalith.models import MODELS
from megalith.optim.build import OPTIMIZERS
from megalith.parallel.plan import PLANS
from megalith.training.tasks import TASKS

REGISTRIES = {
    "model_type": MODELS, "tensor_parallel_plan": PLANS, "dataset": DATASETS, "loss": TASKS, "tokenizer_type": TOKENIZERS,
    "optimizer": OPTIMIZERS,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, field in fields().items() if field.metadata["names"]])
def test_names_are_those_of_the_registry(name):
    assert set(fields()[name].metadata["names"]) == set(REGISTRIES[name])


@pytest.mark.parametrize("name", REGISTRIES)
def test_another_name_is_refused_at_the_start_and_ones_own_is_not(name):
    def told(value):
        return [each.text for each in find_problems(RunConfig().replace(**{name: value}), data=False) if name in each.fields]

    (text,) = told("foo")
    assert text.startswith(f"--{name.replace('_', '-')}: found 'foo'; it is one of ") and "or module:name of your own" in text
    assert told("mine:Thing") == []


VALUED = [name for name, (nargs, _) in legacy_megatron.not_needed().items() if nargs]


@pytest.mark.parametrize("name", VALUED)
def test_what_follows_a_flag_that_is_not_needed_is_looked_at(name):
    problems = flags.read([name, "foo"]).problems
    if name in legacy_megatron.PATHS:
        assert problems == []
        return
    (problem,) = problems
    assert problem.text.startswith(f"{name}: found 'foo'; it is ")
    right = legacy_megatron.CHOICES.get(name, ("1", "0.5", "5e8"))
    assert all(flags.read([name, value]).problems == [] for value in right)


def test_no_word_is_listed_for_a_flag_that_is_not_there():
    assert {*legacy_megatron.PATHS, *legacy_megatron.CHOICES} <= set(VALUED)


def test_the_nearest_is_named():
    (problem,) = flags.read(["--DDP-impl", "Locl"]).problems
    assert problem.text == "--DDP-impl: found 'Locl'; it is one of local, torch, FSDP. Write --DDP-impl local."
