"""Exact search against brute force, FAISS against exact search."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import ConfigError, DataError
from megalith.retrieval import search, store
from megalith.retrieval.search import ExactIndex, FaissIndex, build_faiss, measure_recall, recall
from megalith.retrieval.store import Plan, Store


def make_store(folder, vectors, shard_rows=300, **settings) -> Store:
    plan = Plan(len(vectors), vectors.shape[1], shard_rows, ("id",), {"kind": "none"}, settings=settings)
    for shard in store.begin(folder, plan):
        here = plan.range_of(shard)
        store.write_shard(folder, shard, vectors[here.start : here.stop], np.array(here)[:, None])
    return Store(folder)


@pytest.fixture(scope="module")
def clustered(tmp_path_factory) -> Store:
    random = np.random.RandomState(0)
    centres = random.randn(20, 16)
    vectors = centres[random.randint(0, 20, 1000)] + 0.3 * random.randn(1000, 16)
    return make_store(tmp_path_factory.mktemp("clustered"), vectors.astype(np.float32))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(3, 15), st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_exact_search_is_brute_force(tmp_path_factory, rows, k, shard_rows, kinds):
    """With few different vectors most scores are equal: then the smaller row comes first."""
    random = np.random.RandomState(rows * 100 + k)
    vectors = random.randint(-kinds, kinds + 1, (rows, 3)).astype(np.float32)
    with mock.patch("os.fsync"):  # hundreds of files that nobody will miss
        found = make_store(tmp_path_factory.mktemp("s"), vectors, shard_rows)
    queries = torch.from_numpy(random.randint(-2, 3, (5, 3)).astype(np.float32))
    scores = queries.numpy() @ vectors.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    for cache in (True, False):
        best, where = ExactIndex(found, cache).search(queries, k)
        np.testing.assert_array_equal(where, order)
        np.testing.assert_array_equal(best, np.take_along_axis(scores, order, axis=1))


@pytest.mark.parametrize("name", [None, "Flat"])
def test_by_distance(tmp_path, name):
    """Of whole numbers, so that distances are exact; the best first, with their negative squared distances."""
    random = np.random.RandomState(3)
    vectors, queries = (random.randint(-9, 10, (rows, 4)).astype(np.float32) for rows in (50, 6))
    found = make_store(tmp_path, vectors, 20, metric="l2")
    scores = -((queries[:, None] - vectors[None]) ** 2).sum(axis=2)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :7]
    best, where = (build_faiss(found, name) if name else ExactIndex(found)).search(torch.from_numpy(queries), 7)
    np.testing.assert_array_equal(best, np.take_along_axis(scores, order, axis=1))
    np.testing.assert_array_equal(np.take_along_axis(scores, where, axis=1), best)
    if name is None:  # FAISS takes any of equal ones
        np.testing.assert_array_equal(where, order)


def test_a_damaged_faiss_index_is_named_and_built_again(tmp_path):
    store_ = make_store(tmp_path, np.eye(9, 4, dtype=np.float32))
    path = build_faiss(store_, "Flat").path
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert list(store.verify(tmp_path)) == [(path.name, "has another checksum than when it was written")]
    lines = []
    build_faiss(store_, "Flat", notice=lines.append)
    assert lines == [f"{path} has another checksum than when it was written: it is built again"]
    assert path.read_bytes() == content and list(store.verify(tmp_path)) == []


def test_chunks_change_nothing(clustered, monkeypatch):
    queries = torch.from_numpy(clustered.vectors(np.arange(50)))
    expected = ExactIndex(clustered).search(queries, 7)
    monkeypatch.setattr(search, "CHUNK", 64)
    monkeypatch.setattr(search, "QUERIES", 9)
    found = ExactIndex(clustered, cache=False).search(queries, 7)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "least"),
    [("Flat", 1.0), ("HNSW32", 0.9), ("IVF16,Flat", 0.2), pytest.param("PQ8", 0.3, marks=pytest.mark.slow)],
)
def test_faiss_finds_most_of_what_an_exact_search_finds(clustered, name, least):
    index = build_faiss(clustered, name)
    assert measure_recall(clustered, index) >= least
    again = FaissIndex(clustered, name)  # from its file
    queries = torch.from_numpy(clustered.vectors(np.arange(5)))
    np.testing.assert_array_equal(again.search(queries, 3)[1], index.search(queries, 3)[1])


def test_mistakes_are_named(clustered, tmp_path):
    with pytest.raises(ConfigError, match="--index-string must be an index of FAISS for vectors of 16; found 'HSNW'"):
        build_faiss(clustered, "HSNW")
    with pytest.raises(ConfigError, match="must have at most 1000 lists"):
        build_faiss(clustered, "IVF4096,Flat")
    with pytest.raises(DataError, match="must be built first"):
        FaissIndex(clustered, "HNSW8")
    with pytest.raises(DataError, match="Vectors of queries must have 16 elements"):
        ExactIndex(clustered).search(torch.zeros(1, 8), 3)
    search.faiss_path(clustered, "HNSW9").write_bytes(b"no index")
    with pytest.raises(DataError, match="is damaged"):
        FaissIndex(clustered, "HNSW9")


def test_recall_is_counted_by_hand():
    assert recall(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 9, 1], [-1, -1, 6]])) == 0.5
