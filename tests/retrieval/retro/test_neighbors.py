"""Index and neighbours: against loops over transformers' own vectors, over processes, kills and damage."""

import pathlib
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

from megalith.common.errors import ConfigError, DataError
from megalith.data import array_folder
from megalith.data.build import build_datasets, sample_counts
from megalith.data.retro import ChunkDatabase, Neighbors, samples_fingerprint
from megalith.data.samples.blended import source_of
from megalith.retrieval import search
from megalith.retrieval.embed import BertEmbedder
from megalith.retrieval.retro.verifying import verify
from megalith.retrieval.sources import pack_queries
from megalith.retrieval.store import Store
from megalith.testing import run_ranks
from tests.retrieval.retro.toy_retro import EOD, LENGTH, config_of, contents, gpt_tokenizer, steps_of

SPLITS = {"train": 24, "valid": 12, "test": 4}  # samples that the run requests


def steps(names, data, bert, workdir, stop_after=None, index_string=None, changes=None):
    """Run steps, which may stop before their end as a killed process does."""
    running = steps_of(config_of(*data, **(changes or {})), workdir, bert, index_string=index_string)
    whole, written = array_folder.write_part, []

    def stop(*arguments, **facts):
        if len(written) == stop_after:
            raise KeyboardInterrupt
        written.append(whole(*arguments, **facts))

    with mock.patch.object(array_folder, "write_part", whole if stop_after is None else stop):
        try:
            return [getattr(running, name)() for name in names]
        except KeyboardInterrupt:
            return None


@pytest.fixture(scope="module")
def one(blend, retro_bert, tmp_path_factory):
    """All steps by one process, over a blend."""
    folder = tmp_path_factory.mktemp("one") / "retro"
    steps(("db",), blend, retro_bert, folder)
    run_ranks(steps, 1, ("index", "neighbors"), blend, retro_bert, folder)
    return folder


@pytest.fixture(scope="module")
def vectors(retro_bert):
    """A function from the tokens of a chunk to its vector, by transformers; None where it has no text."""
    import transformers

    model = transformers.BertModel.from_pretrained(retro_bert).eval()
    words = (pathlib.Path(retro_bert) / "vocab.txt").read_text().split()

    @torch.no_grad()
    def vector(tokens):
        ids = [words.index(str(token)) for token in tokens if token != EOD]
        if not ids:
            return None
        ids = torch.tensor([[words.index("[CLS]"), *ids, words.index("[SEP]")]])
        return model(ids).last_hidden_state[0, 1:-1].mean(dim=0).numpy()

    return vector


def test_keys_are_the_mean_over_the_tokens(one, vectors):
    database, store = ChunkDatabase(one / "db"), Store(one / "index")
    assert len(store) == len(database) > 60 and store.row(17) == {"chunk": 17}
    expected = np.stack([vectors(database.chunk(number).tolist()) for number in range(len(database))])
    np.testing.assert_allclose(store.vectors(np.arange(len(store))), expected, atol=2e-3, rtol=2e-3)


def embedded(bert, layout):
    """Vectors by a BERT in a layout, of texts of different lengths."""
    embedder = BertEmbedder.load(bert, config_of("x", **layout).parallel)
    rows = pack_queries(embedder.tokenizer, ["1 2 3", "39", "7 " * 20, "5 6 7 8 9 10 11 12 13"], 32)
    vectors = embedder.embed(rows)
    return None if vectors is None else vectors.tolist(), embedder.probe()


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        pytest.param({"tensor_model_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param({"pipeline_model_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["tensor-sequence", "tensor", "pipeline"],
)
def test_a_split_model_gives_the_same_vectors(retro_bert, layout):
    ((expected, probe),) = run_ranks(embedded, 1, retro_bert, {})
    for found, other in run_ranks(embedded, 2, retro_bert, layout):
        if found is not None:
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(other, probe, rtol=1e-4, atol=1e-5)
    assert found is not None  # the last process has the end of the model


def nearest(query, keys, k):
    """The numbers of the nearest keys by distance."""
    return np.argsort(((keys - query) ** 2).sum(axis=1), kind="stable")[:k].tolist()


@pytest.mark.parametrize("split", SPLITS)
def test_neighbours_are_those_of_a_loop(one, blend, vectors, split):
    """Section 2.2 of the paper as a loop: the nearest chunks, without those of the sample's own documents."""
    config = config_of(*blend)
    dataset = build_datasets(config, gpt_tokenizer())[split]
    database, store = ChunkDatabase(one / "db"), Store(one / "index")
    keys, rows = store.vectors(np.arange(len(store))), database.rows(np.arange(len(store)))
    found = Neighbors(one / "neighbors" / split, samples_fingerprint(config, split, SPLITS[split], database))
    assert len(found) == SPLITS[split]
    dropped = empty = 0
    for sample in range(len(found)):
        ids, (source, number) = dataset[sample]["input_ids"], source_of(dataset, sample)
        own = {(blend[1::2].index(source.indexed.prefix), document) for document in source.locate(number)[0]}
        assert found.of(sample).shape == (4, 5) and found.of(sample).dtype == np.int64
        for chunk, mine in zip(ids.reshape(4, LENGTH).tolist(), found.of(sample).tolist()):
            query = vectors(chunk)
            asked = [] if query is None else nearest(query, keys, 12)
            kept = [number for number in asked if (rows[number, 0], rows[number, 1]) not in own]
            assert mine == (kept[:5] + [-1] * 5)[:5]
            dropped, empty = dropped + len(asked) - len(kept), empty + (query is None)
            for number in filter(lambda number: number >= 0, mine):
                assert (rows[number, 0], rows[number, 1]) not in own
    assert (dropped > 20) == (split == "train")  # other splits' documents are not in the database


def test_own_documents_are_those_of_the_sample(one, blend):
    """The tokens of a sample are found in the documents that it is said to be made of."""
    config = config_of(*blend)
    dataset = build_datasets(config, gpt_tokenizer())["train"]
    for sample in range(24):
        source, number = source_of(dataset, sample)
        documents, offset = source.locate(number)
        tokens = np.concatenate([source.indexed.get(document) for document in documents])
        whole = np.append(dataset[sample]["input_ids"], dataset[sample]["labels"][-1])
        assert tokens[offset : offset + len(whole)].tolist() == whole.tolist()
        assert sum(source.indexed.lengths[documents[:-1]]) - offset < len(whole)  # the last one is needed


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_writes_the_same(one, blend, retro_bert, tmp_path, ranks):
    shutil.copytree(one / "db", tmp_path / "db")
    run_ranks(steps, ranks, ("index", "neighbors"), blend, retro_bert, tmp_path)
    assert contents(tmp_path) == contents(one)
    assert {len(list((tmp_path / "neighbors" / split).glob("*.npy"))) for split in SPLITS} == {1, 3, 5}


@pytest.mark.parametrize("finished", [0, 2, 3, 5, pytest.param(11, marks=pytest.mark.slow)])
def test_killed_and_resumed(one, blend, retro_bert, tmp_path, finished):
    """3 shards of the index and 9 blocks of neighbours: killed after any of them."""
    shutil.copytree(one / "db", tmp_path / "db")
    arguments = ("index", "neighbors"), blend, retro_bert, tmp_path
    assert run_ranks(steps, 1, *arguments, finished)[0] is None
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*.npy")}
    run_ranks(steps, 2, *arguments)
    assert contents(tmp_path) == contents(one)
    assert times == {path: path.stat().st_mtime_ns for path in times}


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damaged_parts_are_named_and_written_again_alone(one, blend, retro_bert, tmp_path, capfd):
    shutil.copytree(one, tmp_path / "r")
    names = ("db/00001.invalid.npy", "index/00002.vectors.npy", "neighbors/train/00003.neighbors.npy")
    assert all(not lines for _, _, lines in verify(tmp_path / "r"))
    (tmp_path / "r" / names[0]).write_bytes(b"short")
    for name in names[1:]:
        damage(tmp_path / "r" / name)
    found = [line for _, _, lines in verify(tmp_path / "r") for line in lines]
    assert found == [f"{tmp_path}/r/{name} has another checksum than when it was written" for name in names]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*.npy")}
    arguments = blend, retro_bert, tmp_path / "r"
    steps(("db",), *arguments)
    run_ranks(steps, 1, ("index", "neighbors"), *arguments)
    assert contents(tmp_path / "r") == contents(one)
    written = {str(path.relative_to(tmp_path / "r")) for path in times if path.stat().st_mtime_ns != times[path]}
    assert written == {*names, "db/00001.chunks.npy", "index/00002.rows.npy"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 12}, "one seed, which was 11 when it was begun; found 12"),
        ({"seq_length": 64}, "one seq_length, which was 32 when it was begun; found 64"),
        ({"split": "70,25,5"}, "one split, which was 80,15,5 when it was begun; found 70,25,5"),
        ({"train_iters": 7}, "one samples, which was 24 when it was begun; found 28"),
    ],
)
def test_neighbours_of_other_samples_are_refused(one, blend, changes, message):
    config = config_of(*blend, **changes)
    fingerprint = samples_fingerprint(config, "train", sample_counts(config)[0], ChunkDatabase(one / "db"))
    with pytest.raises(DataError, match=f"neighbors/train must be built with {message}"):
        Neighbors(one / "neighbors/train", fingerprint)
    swapped = config_of("0.7", blend[3], "0.3", blend[1])
    with pytest.raises(DataError, match=r"must be built with one data, which was 0\.7 "):
        Neighbors(one / "neighbors/train", samples_fingerprint(swapped, "train", 24, ChunkDatabase(one / "db")))


def test_what_is_incomplete_or_out_of_range_is_named(one, tmp_path):
    found = Neighbors(one / "neighbors/valid", {})
    with pytest.raises(IndexError, match=r"sample 12 of .* which has the neighbours of 12"):
        found.of(12)
    shutil.copytree(one / "neighbors/valid", tmp_path / "valid")
    (tmp_path / "valid/00001.json").unlink()
    with pytest.raises(DataError, match=r"1 of 3 missing, first 1\. Give the same megalith retro neighbors command"):
        Neighbors(tmp_path / "valid", {})
    with pytest.raises(DataError, match=r"must be there; found None\. Make it with megalith retro neighbors"):
        Neighbors(tmp_path / "other", {})


def mistakes(data, bert, workdir):
    found = []
    cases = ({"seq_length": 36}, {"vocab_size": 41}, {}, {"train_iters": 0, "eval_iters": 0})
    for changes in cases:
        try:
            steps(("neighbors",), data, bert, workdir, None, None if changes else "IVF4,Flat", changes)
        except (ConfigError, DataError) as error:
            found.append(str(error))
    return found


def test_mistakes_are_named(one, blend, retro_bert):
    found = run_ranks(mistakes, 1, blend, retro_bert, one)[0]
    assert len(found) == 4, found
    assert "--seq-length must be a multiple of the chunks' length, 8; found 36" in found[0]
    assert "The tokenizer of the GPT must have the vocabulary that" in found[1]
    assert "must be built first" in found[2] and "megalith retro index --index-string IVF4,Flat" in found[2]
    assert "must have samples" in found[3]


def test_faiss_by_distance(one, blend, retro_bert, tmp_path):
    """An index of FAISS that holds the vectors as they are gives the neighbours of the exact search."""
    shutil.copytree(one / "db", tmp_path / "db")
    shutil.copytree(one / "index", tmp_path / "index")
    arguments = blend, retro_bert, tmp_path, None, "IVF4,Flat"
    lines = run_ranks(steps, 1, ("index", "neighbors"), *arguments)[0]
    assert "IVF4,Flat: recall of the 20 nearest 1.000" in lines[0]  # nprobe is all of the lists
    for split in SPLITS:
        expected, found = (Neighbors(folder / "neighbors" / split, {}) for folder in (one, tmp_path))
        same = [np.mean(expected.of(sample) == found.of(sample)) for sample in range(len(expected))]
        assert np.mean(same) > 0.97  # equal but for ties in the last digits
    path = search.faiss_path(Store(tmp_path / "index"), "IVF4,Flat")
    before = path.read_bytes()
    damage(path)
    found = [line for _, _, lines in verify(tmp_path) for line in lines]
    assert found == [f"{path} has another checksum than when it was written"]
    run_ranks(steps, 1, ("index",), *arguments)
    assert path.read_bytes() == before
