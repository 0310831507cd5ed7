"""Bi-encoders of Megatron-LM (biencoder_model.py), made by hand: two towers, a shared one, with and without parts."""

import argparse
import pathlib

import pytest
import torch

from megalith.checkpoint import formats
from megalith.checkpoint.formats import FORMATS, MegatronOptions
from megalith.common.errors import CheckpointError
from megalith.config.parameter_kinds import tower_name
from megalith.config.parameters import bert_encoder_shapes
from megalith.generation.load import load
from tests.checkpoint import megatron_files

FORMS = {
    "two towers": {"biencoder_projection_dim": 8},
    "shared": {"biencoder_projection_dim": 8, "biencoder_shared_query_context_model": True},
    "no projection": {"bert_no_binary_head": True},
    "shared, no projection": {"biencoder_shared_query_context_model": True},
}


def write(folder: pathlib.Path, with_arguments: bool = True, version: float = 3.0, year: int = 2022, **form):
    """A Megatron directory of a bi-encoder; its config and its tensors under our names."""
    config, tensors = megatron_files.model_of(model_type="ict", num_layers=2, **form)
    shared = config.biencoder_shared_query_context_model
    models = {"shared_model": "query"} if shared else {"query_model": "query", "context_model": "context"}
    found = {}
    for name, tower in models.items():
        bert = {each: tensors.get(tower_name(tower, each)) for each in bert_encoder_shapes(config)}
        bert = {each: tensor for each, tensor in bert.items() if tensor is not None}
        one = megatron_files.write(folder / name, config, bert, version=version, year=year)
        path = one / "iter_0000007/mp_rank_00/model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        found[name] = {"language_model": content["model"]["language_model"]}
        if config.biencoder_projection_dim:
            projection = {kind: tensors[f"{tower}_head.projection.{kind}"] for kind in ("weight", "bias")}
            found[name]["projection_enc"] = projection
    more = {
        name: getattr(config, name) for name in ("biencoder_projection_dim", "biencoder_shared_query_context_model")
    }
    more |= {"bert_binary_head": not config.bert_no_binary_head}
    args = megatron_files.namespace(config, 1, 1, 128, more)
    target = folder / "all/iter_0000007/mp_rank_00"
    target.mkdir(parents=True)
    content |= {"model": found} | ({"args": args} if with_arguments else {})
    torch.save(content, target / "model_optim_rng.pt")
    return folder / "all", config, tensors


def read(folder: pathlib.Path, **options):
    """What the format gives: a Weights."""
    return formats.read(folder, "megatron", options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_arguments", [True, False])
def test_every_tensor_is_read(tmp_path, form, with_arguments):
    version, year = (3.0, 2022) if with_arguments else (0.0, 2019)
    folder, config, tensors = write(tmp_path, with_arguments, version, year, **FORMS[form])
    options = {} if with_arguments else {"overrides": {"num_attention_heads": 4, "vocab_size": 96}}
    found = read(folder, **options)
    model = found.config.model
    for name in ("model_type", "num_layers", "hidden_size", "vocab_size", *FORMS[form]):
        assert getattr(model, name) == getattr(config, name), name
    assert {name.removeprefix("model/") for name in found.tensors} == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found.tensors[f"model/{name}"].read(), tensor), name


def test_it_loads_as_any_other(tmp_path):
    folder, _, tensors = write(tmp_path, **FORMS["two towers"])
    model = load(folder, device="cpu").model
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in model.named_parameters())


def test_what_is_missing_is_named(tmp_path):
    folder, _, _ = write(tmp_path, **FORMS["two towers"])
    path = folder / "iter_0000007/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    assert isinstance(content["args"], argparse.Namespace)
    del content["model"]["context_model"]["language_model"]["encoder"]["layers.1.mlp.dense_h_to_4h.weight"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.context\.mlp\.up\.weight"):
        read(folder)


def test_it_is_not_written(tmp_path):
    folder, _, _ = write(tmp_path, **FORMS["shared"])
    with pytest.raises(CheckpointError, match="is read from Megatron's files, and not written"):
        FORMATS.find("megatron").write(read(folder), tmp_path / "out", MegatronOptions())
    assert not (tmp_path / "out").exists()
