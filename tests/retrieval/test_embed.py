"""A store by any number of processes is the same; what was killed is resumed; another model is noticed."""

import os

import numpy as np
import pytest

from megalith.common.errors import DataError
from megalith.config.run import RunConfig
from megalith.data.indexed import IndexedDataset
from megalith.retrieval import store
from megalith.retrieval.embed import Embedder, build
from megalith.retrieval.search import ExactIndex
from megalith.retrieval.sources import Blocks, open_source, pack_queries
from megalith.retrieval.store import Store, check_probe
from megalith.testing import run_ranks


def build_here(run, sentences, folder, stop_after=None, **layout):
    """`build`, which may stop before its end as a killed process does."""
    embedder = Embedder.load(run, RunConfig().replace(device="cpu", **layout).parallel)
    source = Blocks(sentences, None, embedder.tokenizer, 24, one_sentence=True)
    if stop_after is not None:
        whole, written = store.write_shard, []

        def stop(*arguments):
            if len(written) == stop_after:
                raise KeyboardInterrupt
            written.append(whole(*arguments))

        store.write_shard = stop
    try:
        return build(embedder, source, folder, batch_size=7, shard_rows=20)
    except KeyboardInterrupt:
        return None
    finally:
        if stop_after is not None:
            store.write_shard = whole


@pytest.fixture(scope="module")
def one(ict_run, sentences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "store"
    run_ranks(build_here, 1, ict_run, sentences, str(folder))
    return folder


def test_any_number_of_processes_writes_the_same(one, ict_run, sentences, tmp_path):
    for ranks in (2, 3):
        run_ranks(build_here, ranks, ict_run, sentences, str(tmp_path / f"{ranks}"))
        names = sorted(path.name for path in one.iterdir())
        assert names == sorted(path.name for path in (tmp_path / f"{ranks}").iterdir()) and len(names) > 9
        for name in names:
            assert (tmp_path / f"{ranks}" / name).read_bytes() == (one / name).read_bytes(), name


@pytest.mark.parametrize("layout", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_a_split_model_gives_the_same_vectors(one, ict_run, sentences, tmp_path, layout):
    run_ranks(build_in_layout, 2, ict_run, sentences, str(tmp_path / "s"), layout)
    expected, found = Store(one), Store(tmp_path / "s")
    rows = np.arange(len(expected))
    np.testing.assert_allclose(found.vectors(rows), expected.vectors(rows), rtol=2e-3, atol=2e-3)


def build_in_layout(run, sentences, folder, layout):
    build_here(run, sentences, folder, **layout)


def test_killed_and_resumed(one, ict_run, sentences, tmp_path):
    folder = tmp_path / "s"
    run_ranks(build_here, 1, ict_run, sentences, str(folder), 2)
    assert len(list(folder.glob("[0-9]*.json"))) == 2
    times = {path.name: os.stat(path).st_mtime_ns for path in folder.glob("0000[01].vectors.npy")}
    run_ranks(build_here, 2, ict_run, sentences, str(folder))
    assert times == {name: os.stat(folder / name).st_mtime_ns for name in times}
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in one.iterdir())


def look(run, sentences, folder):
    embedder, found = Embedder.load(run, RunConfig().replace(device="cpu").parallel), Store(folder)
    check_probe(found, embedder.probe(), run)
    source = open_source(found.plan.source, embedder.tokenizer)
    data, errors = IndexedDataset(sentences), []
    for number in range(len(found)):
        row = found.row(number)
        words = np.concatenate([data.get(each) for each in range(row["first"], row["last"])]).tolist()
        if source.text(row)[1] != embedder.tokenizer.decode(words) or row["block"] != number:
            errors.append(number)
    block = embedder.embed(source.ids(range(3, 4)))
    other = embedder.queries(["w1 w1 w2"])
    again = embedder.embed(pack_queries(embedder.tokenizer, ["w1 w1 w2"], 24), "query")
    with pytest.raises(DataError, match="makes another vector of the same text"):
        check_probe(found, [-value for value in embedder.probe()], run)
    return errors, ExactIndex(found).search(block, 1)[0].tolist(), block.square().sum().item(), other.equal(again)


def test_rows_are_the_texts(one, ict_run, sentences):
    errors, ((score,),), squared, equal = run_ranks(look, 1, ict_run, sentences, str(one))[0]
    assert errors == [] and equal
    assert score >= squared * 0.99  # no vector scores less than the block's own
