"""Casts to narrower formats: what they cannot hold is named before anything is written."""

import dataclasses
import pathlib

import pytest
import torch

import megalith
from megalith.checkpoint import formats
from megalith.checkpoint.formats import MegatronOptions
from megalith.checkpoint.tensors.lazy import BLOCK, Lazy, check_range
from megalith.checkpoint.weights import write
from megalith.common.errors import CheckpointError
from megalith.workflows import conversion
from tests.originals.families import MODELS


def lazy(tensor: torch.Tensor, box: bool = False) -> Lazy:
    """A tensor that is there; box: one that can be read in parts."""
    return Lazy(
        shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor, box=tensor.__getitem__ if box else None
    )


@pytest.mark.parametrize("box", [False, True])
def test_elements_beyond_the_range_are_counted(box: bool) -> None:
    large = torch.zeros(3, BLOCK)
    large[0, 0] = large[2, -1] = 65520.0  # rounds to infinity; 65519 does not
    near = torch.tensor([65519.0, -65504.0, torch.inf, torch.nan])  # what is infinite already is not made so
    tensors = {"a": lazy(large, box), "b": lazy(torch.tensor(-1e6)), "c": lazy(near, box)}
    message = (
        r"--dtype must have the range of the weights: float16 holds numbers up to 65504, and 3 weights would become "
        "infinite: 2 in a, 1 in b; found 'float16'. Write --dtype bfloat16"
    )
    with pytest.raises(CheckpointError, match=message):
        check_range(tensors, torch.float16)
    check_range(tensors, torch.bfloat16)
    check_range({"a": lazy(large.bfloat16())}, None)
    with pytest.raises(CheckpointError, match="1 weights would become infinite: 1 in a"):
        check_range({"a": lazy(torch.tensor([3.4e38, 3.38e38]))}, torch.bfloat16)
    with pytest.raises(
        CheckpointError,
        match=r"float32 holds numbers up to .* 1 in a; .* Leave it out, which keeps the source's float64",
    ):
        check_range({"a": lazy(torch.tensor([1e39], dtype=torch.float64))}, torch.float32)
    with pytest.raises(CheckpointError, match="1 in a"):
        check_range({"a": lazy(torch.tensor([1e5]).bfloat16())}, torch.float16)


@pytest.mark.parametrize("box", [False, True])
def test_a_weight_of_which_nothing_is_left_is_named(box: bool) -> None:
    small = torch.full((3, BLOCK), 1e-9)
    tensors = {"up.weight": lazy(small, box), "up.bias": lazy(small[0]), "down.weight": lazy(torch.zeros(2, 2))}
    message = (
        r"--dtype must have the range of the weights: float16 holds numbers from 6e-08, and all elements would become "
        "0 in 1 weights: up.weight; found 'float16'. Write --dtype bfloat16"
    )
    with pytest.raises(CheckpointError, match=message):
        check_range(tensors, torch.float16)
    check_range(tensors, torch.bfloat16)
    small[2, -1] = 6e-8  # one element that is left
    check_range(tensors, torch.float16)


@pytest.fixture
def sources(tmp_path: pathlib.Path) -> dict[str, pathlib.Path]:
    """One model with weights beyond float16, in three formats."""
    model = MODELS["gpt2"]()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[2, :3] = 1e5
    model.save_pretrained(tmp_path / "huggingface")
    write(formats.read(tmp_path / "huggingface"), tmp_path / "megalith")
    conversion.convert(tmp_path / "huggingface", tmp_path / "megatron", to="megatron")
    return {name: tmp_path / name for name in ("huggingface", "megalith", "megatron")}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["huggingface", "megalith", "megatron"])
def test_no_conversion_writes_infinities(to: str, sources: dict, tmp_path: pathlib.Path) -> None:
    for source in sources.values():
        with pytest.raises(
            CheckpointError,
            match=r"3 weights would become infinite: 3 in model/layers.1.mlp.up.weight; .*\. Write --dtype bf",
        ):
            conversion.convert(source, tmp_path / "new", to=to, options=dict(dtype="float16"))
        assert not (tmp_path / "new").exists()
    conversion.convert(sources["huggingface"], tmp_path / "new", to=to, options=dict(dtype="bfloat16"))


def test_no_loading_makes_infinities(sources: dict) -> None:
    for source in sources.values():
        with pytest.raises(
            CheckpointError, match=r"3 weights would become infinite: 3 in (model/)?layers.1.mlp.up.weight"
        ):
            megalith.load(source, device="cpu", dtype="float16")
        assert (
            megalith.load(source, device="cpu", dtype="bfloat16")(torch.zeros(1, 2, dtype=torch.long)).isfinite().all()
        )


def test_a_mixed_source_is_not_narrowed_to_its_first_tensor(sources: dict, tmp_path: pathlib.Path) -> None:
    """Megatron's files have one format: that of the source's first tensor."""
    found = formats.read(sources["huggingface"])
    tensors = {
        name: each.to(torch.float16) if name.endswith("embedding.weight") else each
        for name, each in found.tensors.items()
    }
    with pytest.raises(CheckpointError, match=r"3 in model/layers.1.mlp.up.weight"):
        formats.FORMATS.find("megatron").write(
            dataclasses.replace(found, tensors=tensors), tmp_path / "new", MegatronOptions()
        )
    assert not (tmp_path / "new").exists()
