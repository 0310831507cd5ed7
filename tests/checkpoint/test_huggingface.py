"""Hugging Face folders: read, written back bit for bit, and every way in which one can be broken."""

import json
import pathlib
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megalith.checkpoint import formats, huggingface
from megalith.checkpoint.formats import Options
from megalith.checkpoint.huggingface_families import form
from megalith.checkpoint.weights import own, write
from tests.originals.families import MODELS


@pytest.fixture
def folder(tmp_path: pathlib.Path):
    """`folder(name)`: a saved model of a family at toy size."""

    def make(name: str) -> pathlib.Path:
        torch.manual_seed(0)
        MODELS[name]().save_pretrained(tmp_path / "theirs")
        return tmp_path / "theirs"

    return make


@pytest.mark.parametrize("name", MODELS)
def test_import_then_export_is_bit_exact(name: str, folder, tmp_path: pathlib.Path) -> None:
    theirs = folder(name)
    write(formats.read(theirs), tmp_path / "ours")
    huggingface.write(own(tmp_path / "ours"), tmp_path / "back", Options(max_shard_size=40_000))
    before, after = load_file(theirs / "model.safetensors"), {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    ids = torch.randint(90, (2, 20))
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(each).eval()(ids).logits for each in (theirs, tmp_path / "back"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_of_our_own_making_is_the_same_model(name: str, folder, tmp_path: pathlib.Path) -> None:
    """Without the config.json it came from, as a model trained here has none."""
    theirs = folder(name)
    weights = replace(formats.read(theirs), files={})
    huggingface.write(weights, tmp_path / "back", Options())
    ids = torch.randint(90, (2, 40))
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(each).eval()(ids).logits for each in (theirs, tmp_path / "back"))
    assert torch.equal(one, other) or (one - other).abs().max() < 1e-5
    again = formats.read(tmp_path / "back")
    assert form(again.config.model) == form(weights.config.model)
