"""Options of formats: those of another format's class, and names that no format has, are refused."""

import pathlib
from dataclasses import fields

import pytest

from megalith.checkpoint import formats
from megalith.checkpoint.formats import FORMATS, HuggingFaceOptions, MegatronOptions
from megalith.common.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """What is recognised as a Hugging Face folder."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    return tmp_path


def test_options_of_another_format_are_refused(folder: pathlib.Path) -> None:
    message = "options must be HuggingFaceOptions for the format huggingface; found 'MegatronOptions'"
    with pytest.raises(CheckpointError, match=message):
        formats.read(folder, options=MegatronOptions(qkv_layout="thirds"))


def test_a_name_that_no_format_has_is_refused(folder: pathlib.Path) -> None:
    message = r"options must be options of a checkpoint format; found \['qkv_layuot'\]"
    with pytest.raises(CheckpointError, match=message):
        formats.read(folder, options={"qkv_layuot": "thirds"})


def test_a_format_takes_its_own_options_of_those_given() -> None:
    given = {"dtype": "bfloat16", "qkv_layout": "thirds", "iteration": 5}
    assert HuggingFaceOptions.select(given) == HuggingFaceOptions(dtype="bfloat16")
    names = {name: {each.name for each in fields(FORMATS.find(name).options)} for name in FORMATS}
    assert {name for name, own in names.items() if "iteration" in own} == {*FORMATS} - {"huggingface"}
    assert {name for name, own in names.items() if "tensor_model_parallel_size" in own} == {"megatron"}
