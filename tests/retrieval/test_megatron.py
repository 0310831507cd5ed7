"""Megatron's pickle of embeddings is read, and what it could run is not."""

import os
import pickle

import numpy as np
import pytest

from megalith.common.errors import CheckpointError, DataError
from megalith.retrieval.megatron import import_pickle
from megalith.retrieval.store import Store


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float16", "float32", ">f2"])
def test_embeddings_are_read_by_number(tmp_path, protocol, dtype):
    vectors = {int(number): np.random.RandomState(number).randn(8).astype(dtype) for number in (7, 3, 11)}
    path = tmp_path / "embedded_blocks.pkl"
    path.write_bytes(pickle.dumps({"embed_data": vectors}, protocol=protocol))
    plan = import_pickle(path, tmp_path / "store", shard_rows=2)
    assert (plan.rows, plan.width, plan.shards) == (3, 8, 2)
    found = Store(tmp_path / "store")
    assert [found.row(number)["id"] for number in range(3)] == [3, 7, 11]
    expected = np.stack([vectors[number] for number in (3, 7, 11)]).astype(np.float16)
    np.testing.assert_array_equal(found.vectors(np.arange(3)), expected.astype(np.float32))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


@pytest.mark.parametrize("value", [{"embed_data": {1: Hostile()}}, Hostile()])
def test_code_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(CheckpointError, match="asks for code"):
        import_pickle(tmp_path / "x.pkl", tmp_path / "store")
    assert not (tmp_path / "hostile").exists() and not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "must be a pickle of"),
        ({"embed_data": {}}, "must be a pickle of"),
        ({"embed_data": {1: "a"}}, "must be arrays of numpy"),
        ({"embed_data": {1: np.zeros(4, "int8")}}, "must be arrays of numpy"),
        ({"embed_data": {1: np.zeros(4, "f2"), 2: np.zeros(3, "f2")}}, "must have 4 elements"),
    ],
)
def test_something_else_is_named(tmp_path, value, message):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match=message):
        import_pickle(tmp_path / "x.pkl", tmp_path / "store")
