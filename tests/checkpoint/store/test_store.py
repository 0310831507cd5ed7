"""Files of tensors: hashes of what went in, an index that runs no code, failures of threads that are not lost."""

import hashlib
import os
import pathlib
import pickle

import pytest
import torch

from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store import dcp as store
from megalith.checkpoint.tensors.chunked import DcpFolder
from megalith.common.errors import CheckpointError


def write(folder, state):
    return store.write(state, state, folder, Ranks())


def test_facts_and_hashes(tmp_path):
    state = {f"model/{number}": torch.randn(number, 2) for number in range(9)}
    tensors, sums = write(tmp_path, state)
    assert tensors["model/3"] == {"shape": [3, 2], "dtype": "float32"} and len(tensors) == 9
    assert sorted(sums) == sorted(os.listdir(tmp_path)) == [".metadata", "__0_0.distcp", "__0_1.distcp"]
    for name, facts in sums.items():
        data = (tmp_path / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    store.fill(DcpFolder(tmp_path).lazies(), into)
    assert all(torch.equal(into[name], state[name]) for name in state)


def test_index_holds_no_paths(tmp_path):
    write(tmp_path, {"model/a": torch.ones(2)})
    assert str(tmp_path).encode() not in (tmp_path / ".metadata").read_bytes()


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_an_index_cannot_run_code(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": Malicious(tmp_path / "made")}))
    with pytest.raises(CheckpointError, match=r"\.metadata (asks for code|is damaged)"):
        DcpFolder(tmp_path)
    assert not (tmp_path / "made").exists()
    for rubbish in (b"", b"not a pickle", pickle.dumps(torch.nn.Linear)):
        (tmp_path / ".metadata").write_bytes(rubbish)
        with pytest.raises(CheckpointError, match=r"\.metadata (asks for code|is damaged)"):
            DcpFolder(tmp_path)


def test_an_index_cannot_reach_through_a_module(tmp_path):
    # Pickle follows the dot into what the module imports
    module, name = (
        b"torch.distributed.checkpoint.metadata",
        b"os.system",
    )
    (tmp_path / ".metadata").write_bytes(b"\x80\x04\x8c%c%s\x8c%c%s\x93." % (len(module), module, len(name), name))
    with pytest.raises(CheckpointError, match=r"found 'torch.distributed.checkpoint.metadata.os.system'"):
        DcpFolder(tmp_path)


@pytest.mark.parametrize("file", ["__0_0.distcp", "__0_1.distcp", ".metadata.tmp"])
def test_failure_of_any_file_is_a_failure(tmp_path, monkeypatch, file, capfd):
    write_some = store._HashingFile.write

    def fail(self, data):
        if pathlib.Path(self.file.name).name == file and (self.size > 100 or file == ".metadata.tmp"):
            self.failure = OSError(28, "No space left on device", self.file.name)
            raise self.failure
        return write_some(self, data)

    monkeypatch.setattr(store._HashingFile, "write", fail)
    with pytest.raises(CheckpointError, match=f"No space left on device: .*{file}"):
        write(tmp_path, {f"model/{number}": torch.ones(4000) for number in range(6)})
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64])
def test_fingerprint(dtype):
    tensor = torch.arange(12).view(3, 4).to(dtype)
    other = tensor.clone()
    assert store.fingerprint(tensor) == store.fingerprint(other)
    assert store.fingerprint(tensor[:, 1:]) == store.fingerprint(other[:, 1:].contiguous())
    other.view(torch.uint8)[0, 0] ^= 1
    assert store.fingerprint(tensor) != store.fingerprint(other)
    assert store.fingerprint(torch.empty(0, dtype=dtype)) == 0 and store.fingerprint(tensor[0, 0]) is not None
