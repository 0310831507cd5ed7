"""Files of tensors: lazily read, in shards as large as asked for, damaged ones named."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalith.checkpoint import huggingface_files as files
from megalith.checkpoint.lazy import Lazy
from megalith.common.errors import CheckpointError


def lazy(tensor: torch.Tensor) -> Lazy:
    return Lazy(shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor)


STATE = {
    "a": torch.randn(3, 4),
    "b": torch.randn(5).bfloat16(),
    "c": torch.arange(6),
    "d": torch.randn(2, 2).half(),
    "e": torch.tensor(3.0),
}


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("limit", [10**9, 40, 1])
def test_written_and_read_back(tmp_path, safetensors, limit):
    files.write_tensors(tmp_path, {name: lazy(tensor) for name, tensor in STATE.items()}, limit, safetensors)
    found = files.tensors(files.weight_files(tmp_path))
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert found[name].shape == tuple(tensor.shape) and found[name].dtype == tensor.dtype
        assert torch.equal(found[name].read(), tensor)
    assert len(files.weight_files(tmp_path)) == {10**9: 1, 40: 4, 1: 5}[limit]


def test_bin_files_of_old_torch(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = files.tensors(files.weight_files(tmp_path))
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in STATE.items())


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"a": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found 'builtins.print'; a file of weights holds data and has no use for it"):
        files.tensors(files.weight_files(tmp_path))


def test_damaged_files_are_named(tmp_path):
    texts = {
        "model.safetensors": "model.safetensors: found .*; it must be a safetensors file. Copy or download it again",
        "pytorch_model.bin": "pytorch_model.bin: it is damaged, or not what torch.save writes .*. Copy it again",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(b"garbage")
        with pytest.raises(CheckpointError, match=text):
            files.tensors([tmp_path / name])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"weights: found \['x'\]; a Hugging Face folder has model.safetensors or pytorch_model.bin"):
        (tmp_path / "x").touch()
        files.weight_files(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"missing shards: found \['model-00002-of-00002.safetensors'\]; .* names 2 files"):
        files.weight_files(tmp_path)
    for text in ("{", "[1]"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"it must be (readable JSON|a JSON object)"):
            files.weight_files(tmp_path)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_split_keeps_order_and_limit(sizes, limit):
    made = {str(number): lazy(torch.empty(size, dtype=torch.uint8)) for number, size in enumerate(sizes)}
    shards = files.split(made, limit)
    assert [name for shard in shards for name in shard] == list(made)
    assert all(sum(sizes[int(name)] for name in shard) <= limit or len(shard) == 1 for shard in shards)
