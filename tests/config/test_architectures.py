"""Records of models: what they name is there, and nothing else in the package knows a model's name."""

import dataclasses
import pathlib
import re
import sys
import types

import pytest

from megalith.common.errors import ConfigError
from megalith.common.registry import load
from megalith.config.architectures import ARCHITECTURES, BERT_CLASSIFICATION, GPT, architecture
from megalith.config.checks.checks import find_problems
from megalith.config.parameter_kinds import pattern_of
from megalith.config.parameters import parameter_kind, parameter_shapes
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig

ROOT = pathlib.Path(__file__).parents[2] / "megalith"
SMALL = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "max_position_embeddings": 16, "vocab_size": 31}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_record_names_is_there(name: str) -> None:
    record = architecture(name)
    assert record.name == name
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, str) and ":" in value:
            assert record.find(field.name) is not None
    assert all(load("names", address) is not None for address in record.names.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_has_a_kind_and_a_kind_says_what_is_known(name: str) -> None:
    config = ModelConfig(model_type=name, **SMALL)
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    for parameter in parameter_shapes(config):
        kind = parameter_kind(config, parameter)
        assert set(kind.sizes) | set(kind.presence) <= known, parameter
    with pytest.raises(ConfigError, match=r"A parameter must be among the kinds of .*; found 'layers\.3\.gate'"):
        parameter_kind(config, "layers.3.gate")


def test_numbers_in_a_name() -> None:
    assert pattern_of("layers.3.mlp.experts.17.up.weight") == "layers.{layer}.mlp.experts.{expert}.up.weight"
    assert pattern_of("embedding.weight") == "embedding.weight"


def test_a_class_that_carries_a_record_is_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine:
        architecture = dataclasses.replace(GPT, name="mine")

    module = types.ModuleType("of_this_test")
    module.Mine, module.RECORD, module.OTHER = Mine, Mine.architecture, object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "of_this_test", module)
    assert architecture("of_this_test:Mine") == dataclasses.replace(GPT, name="mine", model="of_this_test:Mine")
    assert architecture("of_this_test:RECORD") is Mine.architecture
    with pytest.raises(ConfigError, match="Give the class such an attribute"):
        architecture("of_this_test:OTHER")
    with pytest.raises(ConfigError, match="plan of the model mine cannot be imported"):
        dataclasses.replace(GPT, name="mine", plan="of_this_test:PLAN").find("plan")


def test_a_model_without_samples_asks_for_ones_own(monkeypatch) -> None:
    class Mine:
        architecture = dataclasses.replace(BERT_CLASSIFICATION, name="mine", dataset=None)

    module = types.ModuleType("of_this_test")
    module.Mine = Mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "of_this_test", module)
    config = RunConfig().replace(model_type="of_this_test:Mine", **SMALL, seq_length=16, loss="classification")
    (problem,) = [each for each in find_problems(config, data=False) if "dataset" in each.fields]
    rule = "must be module:name of your own for of_this_test:Mine, because megalith has no dataset for it"
    assert problem.text == f"--dataset {rule}; found 'gpt'. Write --dataset module:name."
    problems = find_problems(config.replace(dataset="my:Own"), data=False)
    assert not [each for each in problems if "dataset" in each.fields]


def test_nothing_else_asks_which_model_it_is() -> None:
    """A name of a model beside `model_type` is a table or a branch that a new model would have to be added to."""
    names = "|".join(ARCHITECTURES)
    asked = re.compile(rf"model_type (==|!=|in|not in)\b.*|\"({names})\": (\"megalith|[A-Z])")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted(ROOT.rglob("*.py"))
        if path.name != "architectures.py"
        for line in path.read_text().splitlines()
        if (match := asked.search(line)) and (match[2] or re.search(rf"[\"']({names})[\"']", line))
    ]
    # Of other things; the door for Accelerate says what transformers' batches of each kind mean.
    registries = ("data/build.py", "training/tasks.py", "checkpoint/formats/huggingface/", "integrations/accelerate/")
    assert [line for line in found if not line.startswith(registries)] == []
