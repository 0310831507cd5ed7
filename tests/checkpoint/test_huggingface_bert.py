"""BERT from and to Hugging Face: bits, names of old files, what it has no place for."""

import json
import pathlib
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megalith.checkpoint import formats, huggingface
from megalith.checkpoint.formats import Options
from megalith.checkpoint.huggingface_families import form
from megalith.checkpoint.weights import own, write
from megalith.common.errors import CheckpointError
from megalith.runtime.load import load_plain
from megalith.workflows import conversion
from tests.originals.families import BERTS


@pytest.fixture(params=BERTS)
def theirs(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """A saved model."""
    torch.manual_seed(0)
    BERTS[request.param]().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def logits(folder: pathlib.Path) -> tuple[torch.Tensor, ...]:
    """Of both heads, by transformers."""
    ids = torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(0))
    return transformers.AutoModelForPreTraining.from_pretrained(folder).eval()(ids).to_tuple()


def test_there_and_back(theirs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write(formats.read(theirs), tmp_path / "ours")
    huggingface.write(own(tmp_path / "ours"), tmp_path / "back", Options(max_shard_size=40_000))
    before, after = load_file(theirs / "model.safetensors"), {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    wanted = logits(theirs)
    assert all(torch.equal(one, other) for one, other in zip(wanted, logits(tmp_path / "back"), strict=True))
    model, *_ = load_plain(tmp_path / "ours", device="cpu")
    found = model(torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(0)))
    assert all((one - other).abs().max() < 1e-5 for one, other in zip(wanted, found, strict=True))
    assert conversion.verify(theirs, tmp_path / "ours") < 1e-5


def test_a_config_of_our_own_making_is_the_same_model(theirs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    weights = replace(formats.read(theirs), files={})
    huggingface.write(weights, tmp_path / "back", Options())
    assert all(torch.equal(one, other) for one, other in zip(logits(theirs), logits(tmp_path / "back"), strict=True))
    assert form(formats.read(tmp_path / "back").config.model) == form(weights.config.model)


def test_names_of_files_from_tensorflow(tmp_path: pathlib.Path) -> None:
    """As in bert-base-uncased: gamma and beta, and the tied weight once more."""
    BERTS["bert"]().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    wanted = formats.read(tmp_path)["model/layers.1.mlp_norm.bias"]
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value.clone()
        for name, value in tensors.items()
    } | {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone()}
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    weights = formats.read(tmp_path)
    assert torch.equal(weights["model/layers.1.mlp_norm.bias"], wanted) and not weights.notes


@pytest.mark.parametrize("changes", [{"bert_no_binary_head": True}, {"normalization": "RMSNorm"}, {"swiglu": True}])
def test_forms_that_theirs_does_not_have(changes: dict, tmp_path: pathlib.Path) -> None:
    BERTS["bert"]().save_pretrained(tmp_path)
    weights = formats.read(tmp_path)
    other = replace(weights, config=weights.config.replace(**changes), files={})
    with pytest.raises(CheckpointError, match=r"BertForPreTraining has no such form"):
        huggingface.write(other, tmp_path / "back", Options())
