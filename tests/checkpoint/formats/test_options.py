"""Options of formats: those of another format's class, and names that no format has, are refused."""

import pathlib
from dataclasses import dataclass, fields

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megalith.checkpoint import formats
from megalith.checkpoint.formats import FORMATS, Format, HuggingFaceOptions, MegatronOptions, Options
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError
from megalith.runtime.load import load_model
from megalith.workflows.conversion import convert, verify


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """What is recognised as a Hugging Face folder."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    return tmp_path


@pytest.fixture
def gpt2(tmp_path: pathlib.Path) -> pathlib.Path:
    """A whole Hugging Face folder."""
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_options_of_another_format_are_refused(folder: pathlib.Path) -> None:
    message = "The options must be HuggingFaceOptions for the format huggingface; found a MegatronOptions"
    with pytest.raises(CheckpointError, match=message):
        formats.read(folder, options=MegatronOptions(qkv_layout="thirds"))


def test_a_name_that_no_format_has_is_refused(folder: pathlib.Path) -> None:
    message = r"The options must be options of a checkpoint format; found \['qkv_layuot'\]"
    with pytest.raises(CheckpointError, match=message):
        formats.read(folder, options={"qkv_layuot": "thirds"})


def test_a_format_takes_its_own_options_of_those_given() -> None:
    given = {"dtype": "bfloat16", "qkv_layout": "thirds", "iteration": 5}
    assert HuggingFaceOptions.select(given) == HuggingFaceOptions(dtype="bfloat16")
    names = {name: {each.name for each in fields(FORMATS.find(name).options)} for name in FORMATS}
    assert {name for name, own in names.items() if "iteration" in own} == {*FORMATS} - {"huggingface", "peft"}
    assert {name for name, own in names.items() if "tensor_model_parallel_size" in own} == {"megatron"}


@dataclass(frozen=True, kw_only=True)
class LevelOptions(Options):
    """Of a user's own format. level: an option that no format of megalith has."""

    level: int = 0
    iteration: int | None = None


READ: list[LevelOptions] = []


def write_level(weights: Weights, folder: pathlib.Path, options: LevelOptions) -> None:
    READ.append(options)
    (folder / "level").write_text(str(options.level))


OWN = Format("own: a file called level", lambda path: (path / "level").exists(), LevelOptions, pytest.fail, write_level)


def test_a_format_of_a_users_own_gets_its_options(gpt2: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for options in ({"level": 3, "iteration": 5}, LevelOptions(level=3)):
        convert(gpt2, tmp_path / f"own{len(READ)}", to=f"{__name__}:OWN", options=options)
    assert [LevelOptions(level=3, iteration=5), LevelOptions(level=3)] == READ
    with pytest.raises(CheckpointError, match="'levle'"):
        convert(gpt2, tmp_path / "other", to=f"{__name__}:OWN", options={"levle": 3})


def test_options_as_an_object_or_by_name(gpt2: pathlib.Path, tmp_path: pathlib.Path) -> None:
    given = HuggingFaceOptions(dtype="bfloat16")
    convert(gpt2, tmp_path / "one", to="huggingface", options=given)
    convert(gpt2, tmp_path / "two", to="huggingface", options={"dtype": "bfloat16"})
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {each.dtype for each in one.values()} == {torch.bfloat16}
    load_model(gpt2, device="cpu", options=given)
    assert verify(gpt2, tmp_path / "one", given) < 1e-2
