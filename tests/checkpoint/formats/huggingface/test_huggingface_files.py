"""Files of tensors: lazily read, in shards as large as asked for, damaged ones named."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.modeling_utils import _get_resolved_checkpoint_files

from megalith.checkpoint import formats
from megalith.checkpoint.formats.huggingface import files
from megalith.checkpoint.tensors.lazy import Lazy
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
    found = files.open_tensors(files.weight_files(tmp_path))
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert found[name].shape == tuple(tensor.shape) and found[name].dtype == tensor.dtype
        assert torch.equal(found[name].read(), tensor)
    assert len(files.weight_files(tmp_path)) == {10**9: 1, 40: 4, 1: 5}[limit]


def test_bin_files_of_old_torch(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = files.open_tensors(files.weight_files(tmp_path))
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in STATE.items())


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"a": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"asks for code, which a file of weights has no use for.*; found 'builtins.print'"
    ):
        files.open_tensors(files.weight_files(tmp_path))


def test_damaged_files_are_named(tmp_path):
    texts = {
        "model.safetensors": "model.safetensors must be a safetensors file; found .*. Copy or download it again",
        "pytorch_model.bin": "pytorch_model.bin is damaged, or not what torch.save writes .*. Copy it again",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(b"garbage")
        with pytest.raises(CheckpointError, match=text):
            files.open_tensors([tmp_path / name])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"a Hugging Face folder, must have model.safetensors or pytorch_model.bin, .*; found \['x'\]",
    ):
        (tmp_path / "x").touch()
        files.weight_files(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    message = r"must have all 2 files that .* names; found no model-00002-of-00002.safetensors\. Copy"
    with pytest.raises(CheckpointError, match=message):
        files.weight_files(tmp_path)
    for text in ("{", "[1]"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"index.json must be (readable JSON|a JSON object); found"):
            files.weight_files(tmp_path)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_split_keeps_order_and_limit(sizes, limit):
    made = {str(number): lazy(torch.empty(size, dtype=torch.uint8)) for number, size in enumerate(sizes)}
    shards = files.split_into_shards(made, limit)
    assert [name for shard in shards for name in shard] == list(made)
    assert all(sum(sizes[int(name)] for name in shard) <= limit or len(shard) == 1 for shard in shards)


def put(folder, name, **state):
    """A file of safetensors or torch, an index of this {tensor: file}, or something else."""
    if name.endswith(".index.json"):
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": state}))
    elif name.endswith(".safetensors"):
        save_file({key: torch.full((2,), float(value)) for key, value in state.items()}, folder / name)
    elif name.endswith(".bin"):
        torch.save({key: torch.full((2,), float(value)) for key, value in state.items()}, folder / name)
    else:
        (folder / name).touch()


SHARD = "model-00001-of-00001.safetensors"
FILES = {  # name -> content; in the order in which transformers looks for them
    "model.safetensors": {"a": 1},
    "model.safetensors.index.json": {"a": SHARD},
    "pytorch_model.bin": {"a": 3},
    "pytorch_model.bin.index.json": {"a": "pytorch_model-00001-of-00001.bin"},
}


@pytest.mark.parametrize("there", [range(first, last) for first in range(4) for last in range(first + 1, 5)], ids=str)
def test_the_file_that_transformers_takes_is_read_and_others_are_told(tmp_path, there):
    put(tmp_path, SHARD, a=2)
    put(tmp_path, "pytorch_model-00001-of-00001.bin", a=4)
    names = [name for number, name in enumerate(FILES) if number in there]
    for name in names:
        put(tmp_path, name, **FILES[name])
    theirs, _ = _get_resolved_checkpoint_files(tmp_path, None, None, None, {}, False)
    assert [str(file) for file in files.weight_files(tmp_path)] == theirs
    found, notes = files.read_tensors(tmp_path)
    assert found["a"].read().tolist() == [1.0 + there[0]] * 2
    (note,) = notes
    assert note.startswith(f"weights are read from {names[0]}, as transformers does, and not from")
    assert all(name in note for name in names[1:])


def test_weights_of_other_names_are_told_or_named(tmp_path):
    for name in ("model.fp16.safetensors", "tf_model.h5", "training_args.bin", "optimizer.bin"):
        put(tmp_path, name, a=1)
    message = r"found \['model.fp16.safetensors', 'tf_model.h5'\]\. Rename model.fp16.safetensors to one of these"
    with pytest.raises(CheckpointError, match=message):
        files.weight_files(tmp_path)
    put(tmp_path, "model.safetensors", a=2)
    _, (note,) = files.read_tensors(tmp_path)
    assert note.endswith("and not from model.fp16.safetensors, tf_model.h5 beside it")
    put(tmp_path, "own.safetensors", a=5)
    found, _ = files.read_tensors(tmp_path, "own.safetensors")  # transformers_weights of config.json
    assert found["a"].read().tolist() == [5.0, 5.0]
    for name in ("../own.safetensors", "other.safetensors"):
        with pytest.raises(CheckpointError, match=f"transformers_weights must name .*; found '{name}'"):
            files.weight_files(tmp_path, name)


def test_an_index_that_differs_from_its_files_is_told(tmp_path):
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    put(tmp_path, one, a=1, b=2, new=3)
    put(tmp_path, two, c=3)
    put(tmp_path, "model-00003-of-00003.safetensors", a=9)
    put(tmp_path, "model.safetensors.index.json", a=one, b=two, c=two, gone=two)
    found, notes = files.read_tensors(tmp_path)
    assert found.keys() == {"a", "b", "c", "new"} and found["a"].read().tolist() == [1.0, 1.0]
    assert notes == [
        "weights are read from model.safetensors.index.json, as transformers does, "
        "and not from model-00003-of-00003.safetensors beside it",
        f"model.safetensors.index.json says {two} has b; it is read from {one}, where it is",
        "model.safetensors.index.json names tensors that its files do not have: gone",
        "tensors that model.safetensors.index.json does not name, read from its files as transformers does: new",
    ]
    put(tmp_path, two, c=3, a=7)
    message = rf"tensor a must have one value \(.* says that it is in {one}\); found different ones in {one} and {two}"
    with pytest.raises(CheckpointError, match=message):
        files.read_tensors(tmp_path)
    for table in (None, ["a"], {"a": 3}, {"a": None}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
        with pytest.raises(CheckpointError, match=r"weight_map must map names of tensors to names of files; found"):
            files.weight_files(tmp_path)


def test_an_adapter_in_a_models_folder_is_refused_by_name(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    put(tmp_path, "adapter_model.safetensors", a=1)
    put(tmp_path, "model.safetensors", a=1)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(
        CheckpointError, match=r"weights must be a whole model's: .*; found 'adapter_config.json'. Merge them"
    ):
        formats.read(tmp_path)
