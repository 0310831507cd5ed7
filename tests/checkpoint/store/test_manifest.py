"""The manifest: what is changed, cut, lost or from the future is noticed and named."""

import json

import pytest

from megalith.checkpoint.store import manifest
from megalith.common import files
from megalith.common.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "data").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "text").write_text("hello")
    entries = {
        name: {"bytes": (tmp_path / name).stat().st_size, "sha256": files.sha256(tmp_path / name)}
        for name in ("data", "text")
    }
    written_by = {"megalith": "9.9"}
    manifest.write(
        tmp_path,
        {"iteration": 7, "written_by": written_by, "tensors": {"a": {"shape": [2], "dtype": "int8"}}, "files": entries},
    )
    return tmp_path


def test_round_trip(checkpoint):
    content = manifest.read(checkpoint)
    assert (
        content["schema"] == manifest.SCHEMA
        and content["iteration"] == 7
        and content["tensors"]["a"] == {"shape": [2], "dtype": "int8"}
    )
    assert manifest.verify(checkpoint) == manifest.check_sizes(checkpoint) == []


@pytest.mark.parametrize("name", ["data", "text"])
def test_one_flipped_bit_is_found(checkpoint, name):
    data = bytearray((checkpoint / name).read_bytes())
    data[3] ^= 16
    (checkpoint / name).write_bytes(data)
    (problem,) = manifest.verify(checkpoint)
    assert name in problem and "SHA-256" in problem
    assert manifest.check_sizes(checkpoint) == []  # sizes do not tell


@pytest.mark.parametrize("bit", range(0, 8, 3))
def test_any_flipped_bit_of_the_manifest_is_found(checkpoint, bit):
    file = checkpoint / manifest.NAME
    data = file.read_bytes()
    for position in range(0, len(data) - 1, 7):
        file.write_bytes(data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :])
        (problem,) = manifest.verify(checkpoint)
        assert manifest.NAME in problem and "damaged" in problem


def test_truncated_and_missing(checkpoint):
    (checkpoint / "data").write_bytes(b"123")
    (checkpoint / "text").unlink()
    assert manifest.check_sizes(checkpoint) == manifest.verify(checkpoint)
    short, missing = manifest.check_sizes(checkpoint)
    assert "it has 3 bytes" in short and "5120" in short and missing.endswith("text is missing")
    (checkpoint / manifest.NAME).unlink()
    (problem,) = manifest.verify(checkpoint)
    assert "manifest.json is missing" in problem


def test_parts_cover_every_file_once(checkpoint):
    for name in ("data", "text"):
        (checkpoint / name).unlink()
    problems = [manifest.verify(checkpoint, part=(rank, 3)) for rank in range(3)]
    assert sorted(map(len, problems)) == [0, 1, 1]


def test_future_schema_is_refused(checkpoint, monkeypatch):
    content = json.loads((checkpoint / manifest.NAME).read_text())
    monkeypatch.setattr(manifest, "SCHEMA", 2)
    manifest.write(checkpoint, {key: content[key] for key in ("iteration", "written_by", "tensors", "files")})
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match=r"schema 2, written by megalith 9\.9.*reads schemas 1 to 1.*Install a newer"
    ):
        manifest.read(checkpoint)
