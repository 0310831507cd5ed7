"""Options of a text: one list for Python, command line, prompt files and docs; wrong names and values."""

import argparse
import dataclasses
import inspect
import math
import pathlib
import re

import numpy as np
import pytest

from megalith.cli.generate import register
from megalith.common.errors import ConfigError
from megalith.config.flags.text import flag
from megalith.generation.generate import complete, generate, stream
from megalith.generation.params import EXPECTED, GenerationParams, SamplingParams

FIELDS = dataclasses.fields(GenerationParams)
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "generation.md"


def test_every_option_is_an_argument_a_flag_and_a_line_of_the_docs() -> None:
    verbs = argparse.ArgumentParser().add_subparsers()
    register(verbs)
    flags = {name for action in verbs.choices["generate"]._actions for name in action.option_strings}
    options = DOCS.read_text().split("## Options")[1]
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", options, re.MULTILINE))
    assert list(table) == [each.name for each in FIELDS]
    for each in FIELDS:
        assert flag(each.name) in flags
        assert f"{each.name}: {each.metadata['help']}." in GenerationParams.__doc__
        assert table[each.name] == each.metadata["help"]
        for call in (generate, complete, stream):
            assert inspect.signature(call).parameters[each.name].default == getattr(GenerationParams(), each.name)
    assert "temperature: " in SamplingParams.__doc__ and "echo: " not in SamplingParams.__doc__


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("temprature", "unknown option temprature: did you mean temperature?"),
        ("max_tokens", "unknown option --max-tokens: it is --max-new-tokens here"),
        ("num_beams", "unknown option --num-beams: it is --beam-width here"),
        ("eos_token_id", "it is --stop-token-ids here"),
        ("xyz", "unknown option xyz: the options are temperature, top_k, "),
    ],
)
def test_unknown_options_are_answered(name: str, message: str, make) -> None:
    for call in (generate, complete, stream):
        with pytest.raises(ConfigError, match=re.escape(message)):
            call(make(), "Once", **{name: 1})


WRONG_TYPES = {
    "float": ("0.5", None, True, [1]), "int": (0.5, "3", None, True), "int | None": (0.5, "3", True), "bool": (1, "no"),
    "tuple[str, ...]": (3, [3], None), "tuple[int, ...]": ("a", [0.5], None),
    "Mapping[int, float]": ([3], {"a": 1}, {3: "x"}, 5),
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_values_of_other_types_are_named(field: dataclasses.Field) -> None:
    for wrong in WRONG_TYPES[field.type]:
        with pytest.raises(ConfigError, match=f"^{flag(field.name)} must be {EXPECTED[field.type.split(' |')[0]]};"):
            GenerationParams(**{field.name: wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1}, "--temperature must be at least 0; found -1"),
        ({"temperature": math.nan}, "--temperature must be at least 0"),
        ({"temperature": math.inf}, "--temperature must be at most 1e6"),
        ({"top_k": -1}, "--top-k must be at least 0"),
        ({"top_p": 1.5}, "--top-p must lie between 0"),
        ({"top_p_decay": 2, "top_p": 0.5}, "--top-p-decay must lie"),
        ({"top_p_bound": 0.6, "top_p": 0.5}, "--top-p-bound must lie between 0 and top_p; found 0.6"),
        ({"min_p": -0.1}, "--min-p must lie"),
        ({"repetition_penalty": 0}, "--repetition-penalty must lie between 0.01 and 100"),
        ({"presence_penalty": 2.5}, "--presence-penalty must lie between -2 and 2"),
        ({"frequency_penalty": -3}, "--frequency-penalty must lie between -2 and 2"),
        ({"logit_bias": {3: math.inf}}, "--logit-bias must have numbers between -1e6 and 1e6, or -inf"),
        ({"max_new_tokens": -1}, "--max-new-tokens must be at least 0"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "--min-new-tokens must be at most max_new_tokens, 4; found 5"),
        ({"top_logprobs": -1}, "--top-logprobs must be at least 0"),
        ({"num_samples": 0}, "--num-samples must be at least 1"),
        ({"stop": ["a", ""]}, "--stop must be texts of at least one character"),
        ({"beam_width": 0}, "--beam-width must be at least 1"),
        ({"length_penalty": math.inf}, "--length-penalty must lie between -30 and 30"),
        ({"beam_width": 2, "top_k": 3, "stop": "x"}, "--beam-width must be given without .*; found 2 and top_k, stop"),
        ({"beam_width": 2, "top_logprobs": 1}, "--beam-width must be given without"),
    ],
)
def test_values_that_cannot_work_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        GenerationParams(**wrong)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": -1, "top_p": 3, "length_penalty": 99}, ["--temperature", "--top-p", "--length-penalty"]),
        ({"top_k": "many", "stop": 3, "top_p": 3}, ["--top-k", "--stop"]),
        ({"top_p": -0.5, "max_new_tokens": -1}, ["--max-new-tokens", "--top-p"]),  # nothing of bound and min_new_tokens
    ],
)
def test_all_that_is_wrong_is_told_at_once(wrong: dict, named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationParams(**wrong)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{len(named)} problems"
    assert [line.split()[:2] for line in lines] == [[f"{number}.", name] for number, name in enumerate(named, 1)]


def test_values_are_taken_as_python_and_json_write_them() -> None:
    given = GenerationParams(
        stop="ab", stop_token_ids=[np.int64(3)], logit_bias={"5": -1, 6: -math.inf}, temperature=1, top_k=np.int32(2)
    )
    assert (given.stop, given.stop_token_ids, given.logit_bias) == (("ab",), (3,), {5: -1.0, 6: -math.inf})
    assert type(given.temperature) is float and type(given.top_k) is int
    assert given == GenerationParams().replace(**{each.name: getattr(given, each.name) for each in FIELDS})
    greedy = given.replace(greedy=True)
    assert greedy.greedy and greedy.temperature == 0.0 and not given.greedy
    assert given.replace(greedy=False) == given
