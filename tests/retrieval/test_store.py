"""A store of vectors: what is written is read back, what is damaged is named, what was finished is kept."""

import dataclasses
import json

import numpy as np
import pytest

from megalith.common.errors import DataError
from megalith.retrieval import store
from megalith.retrieval.store import Plan, Store

PLAN = Plan(10, 4, 4, ("id",), {"kind": "none", "path": "x"}, "model", (0.5, 1.0), {"batch_size": 2})
VECTORS = np.arange(40, dtype=np.float32).reshape(10, 4) / 7
ROWS = np.arange(10)[:, None] * 3


def write(folder, plan=PLAN, shards=None):
    for shard in store.begin(folder, plan) if shards is None else shards:
        here = plan.range_of(shard)
        store.write_shard(folder, shard, VECTORS[here.start : here.stop], ROWS[here.start : here.stop])


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path / "s")
    found = Store(tmp_path / "s")
    assert len(found) == 10 and found.width == 4 and found.plan == PLAN
    rows = np.array([9, 0, 5, 5, 3])
    np.testing.assert_array_equal(found.vectors(rows), VECTORS.astype(np.float16)[rows].astype(np.float32))
    assert [found.row(number) for number in (0, 4, 9)] == [{"id": 0}, {"id": 12}, {"id": 27}]
    chunks = list(found.chunks(3))
    assert [first for first, _ in chunks] == [0, 3, 4, 7, 8]
    np.testing.assert_array_equal(np.concatenate([part for _, part in chunks]), VECTORS.astype(np.float16))
    assert list(store.verify(tmp_path / "s")) == []


def test_what_was_finished_is_kept(tmp_path):
    assert store.begin(tmp_path, PLAN) == [0, 1, 2]
    write(tmp_path, shards=[1])
    assert store.begin(tmp_path, PLAN) == [0, 2]
    with pytest.raises(DataError, match="2 of 3 missing, first 0"):
        Store(tmp_path)
    moved = dataclasses.replace(PLAN, model="elsewhere", probe=(0.501, 0.999))
    assert store.begin(tmp_path, moved) == [0, 2]  # the same model, at another path and in another format


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 11}, "must be built with one rows, which was 10"),
        ({"settings": {"batch_size": 3}}, "must be built with one settings"),
        ({"source": {"kind": "none", "path": "y"}}, "must be built with one source"),
        ({"probe": (0.5, 2.0)}, "makes another vector of the same text"),
    ],
)
def test_a_store_of_another_plan_is_left_alone(tmp_path, changes, message):
    write(tmp_path / "s", shards=[])
    store.begin(tmp_path / "s", PLAN)
    before = (tmp_path / "s/store.json").read_bytes()
    with pytest.raises(DataError, match=message):
        store.begin(tmp_path / "s", dataclasses.replace(PLAN, **changes))
    assert (tmp_path / "s/store.json").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"found one with thesis\.txt"):
        store.begin(tmp_path, PLAN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt"]


def test_a_corrupted_shard_is_named(tmp_path):
    write(tmp_path)
    path = tmp_path / "00001.vectors.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    (tmp_path / "00002.rows.npy").unlink()
    found = dict(store.verify(tmp_path))
    assert found["00001.vectors.npy"] == "has another checksum than when it was written"
    assert "cannot be read" in found["00002.rows.npy"] and len(found) == 2
    with pytest.raises(DataError, match=r"00002\.rows\.npy cannot be read"):
        Store(tmp_path)
    path.write_bytes(content[:-8])
    with pytest.raises(DataError, match=r"00001\.vectors\.npy"):
        Store(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 2, "rows": 1}'])
def test_a_damaged_description_is_named(tmp_path, text):
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(DataError, match=r"store\.json"):
        store.read_plan(tmp_path)


def test_another_version_is_refused(tmp_path):
    write(tmp_path)
    content = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(content | {"version": 9}))
    with pytest.raises(DataError, match="must be of version 1"):
        store.read_plan(tmp_path)


def test_vectors_that_float16_cannot_hold_are_refused(tmp_path):
    store.begin(tmp_path, PLAN)
    with pytest.raises(DataError, match="below 65504, as float16 holds; found 1e\\+06 in row 1"):
        store.write_shard(tmp_path, 0, np.array([[1.0] * 4, [1e6] * 4]), np.zeros((2, 1), np.int64))
    assert not (tmp_path / "00000.json").exists()
