"""The chunk database: what is cut, that workers and kills change no byte, and that damage is repaired alone."""

import json
import os
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import DataError
from megalith.data import array_folder
from megalith.data.indexed import IndexedDataset
from megalith.data.retro import ChunkDatabase
from megalith.data.samples.splits import split_bounds
from megalith.retrieval.retro.database import build_database, cut, describe
from tests.retrieval.retro.toy_retro import (
    EOD,
    LENGTH,
    SPECIAL,
    WORDS,
    bert_tokenizer,
    config_of,
    contents,
    gpt_tokenizer,
    write_corpus,
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *map(str, range(WORDS))]))
    return gpt_tokenizer(), bert_tokenizer(str(folder))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return [
        write_corpus(str(folder / name), documents, seed)
        for seed, (name, documents) in enumerate([("a", 30), ("b", 9)])
    ]


def build(folder, corpora, tokenizers, workers=1, split="100,0,0", notice=lambda line: None):
    config = config_of(*corpora, split=split)
    description = describe(config.data, *tokenizers, chunk_length=LENGTH, doc_block_size=7, notice=notice)
    return build_database(folder, description, *tokenizers, workers=workers, notice=notice)


@pytest.fixture(scope="module")
def one(corpora, tokenizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "db"
    build(folder, corpora, tokenizers)
    return folder


def documents_of(prefix):
    """Tokens of each document, without the ends after it."""
    found = []
    for tokens in IndexedDataset(prefix):
        listed = tokens.tolist()
        while listed and listed[-1] == EOD:
            listed.pop()
        found.append(listed)
    return found


def test_every_document_is_cut_into_its_chunks(one, corpora):
    """Against a loop written from the definition: what is cut, the continuation, what has no text."""
    expected, invalid = [], 0
    for dataset, prefix in enumerate(corpora):
        for document, tokens in enumerate(documents_of(prefix)):
            for start in range(0, len(tokens), LENGTH):
                chunk = tokens[start : start + LENGTH]
                words = len([token for token in chunk if token != EOD])
                if words:
                    expected.append((dataset, document, start, start + len(chunk), words))
                invalid += words == 0
    found = ChunkDatabase(one)
    assert found.chunk_length == LENGTH and len(found) == len(expected) > 90 and found.invalid == invalid == 2
    np.testing.assert_array_equal(found.rows(np.arange(len(found))), expected)
    texts = [documents_of(prefix) for prefix in corpora]
    for number, (dataset, document, start, end, _) in enumerate(expected):
        assert found.chunk(number).tolist() == texts[dataset][document][start:end]
        follows = (*expected[number + 1][:2], expected[number + 1][2]) if number + 1 < len(expected) else None
        rest = texts[dataset][document][end : end + LENGTH] if follows == (dataset, document, end) else []
        assert found.continuation(number).tolist() == rest


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_chunks_put_together_are_the_document(lengths, length, ends):
    documents = [[*np.arange(size).tolist(), *[99] * ends] for size in lengths]
    indexed = mock.Mock(get=lambda number: np.array(documents[number], np.int64))
    pieces = list(cut(indexed, 0, len(documents), length, 99))
    for number, size in enumerate(lengths):
        mine = [(start, end) for document, start, end in pieces if document == number]
        assert [token for start, end in mine for token in range(start, end)] == list(range(size))
        assert all(end - start == length for start, end in mine[:-1]) and all(end > start for start, end in mine)


def test_any_number_of_workers_writes_the_same(one, corpora, tokenizers, tmp_path):
    for workers in (2, 3):
        build(tmp_path / str(workers), corpora, tokenizers, workers)
        assert contents(tmp_path / str(workers)) == contents(one)
    assert len(contents(one)) == 1 + 3 * 7  # 30 and 9 documents in blocks of 7


@pytest.mark.parametrize("finished", range(7))
def test_killed_and_resumed(one, corpora, tokenizers, tmp_path, finished):
    whole, written = array_folder.write_part, []

    def stop(folder, part, arrays, **facts):
        if len(written) == finished:
            np.save(folder + f"/{part:05d}.chunks.npy", arrays["chunks"])  # a block without its facts is not finished
            raise KeyboardInterrupt
        written.append(whole(folder, part, arrays, **facts))

    with mock.patch.object(array_folder, "write_part", stop), pytest.raises(KeyboardInterrupt):
        build(tmp_path, corpora, tokenizers)
    with pytest.raises(DataError, match=rf"blocks of .* must be complete; found {7 - finished} of 7 missing"):
        ChunkDatabase(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    build(tmp_path, corpora, tokenizers)
    assert contents(tmp_path) == contents(one)
    assert times == {name: (tmp_path / name).stat().st_mtime_ns for name in times} and len(times) == finished + 1


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_block_is_named_and_built_again_alone(one, corpora, tokenizers, tmp_path):
    build(tmp_path, corpora, tokenizers)
    damage(tmp_path / "00002.chunks.npy")
    assert list(array_folder.damaged(tmp_path, 7, ("chunks", "invalid"))) == [
        (2, "00002.chunks.npy", "has another checksum than when it was written")
    ]
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if not path.name.startswith("00002")}
    lines = []
    build(tmp_path, corpora, tokenizers, notice=lines.append)
    assert any("00002.chunks.npy has another checksum" in line and "part 2 is written again" in line for line in lines)
    assert contents(tmp_path) == contents(one)
    assert times == {name: (tmp_path / name).stat().st_mtime_ns for name in times}


def test_megatrons_default_split(corpora, tokenizers, tmp_path):
    """969,30,1 sums to 1000: Megatron's tool takes its first number for a percentage, and stops."""
    found = build(tmp_path, corpora, tokenizers, split="969,30,1")
    bounds = [split_bounds("969,30,1", count)[0] for count in (30, 9)]
    assert [each["documents"] for each in found.description["datasets"]] == [list(each) for each in bounds]
    rows = found.rows(np.arange(len(found)))
    assert [rows[rows[:, 0] == dataset, 1].max() for dataset in (0, 1)] <= [bounds[0][1] - 1, bounds[1][1] - 1]
    assert bounds[0] == (0, 29)


def test_another_database_is_left_alone(one, corpora, tokenizers, tmp_path):
    build(tmp_path / "db", corpora, tokenizers)
    before = contents(tmp_path)
    with pytest.raises(
        DataError, match="must be built with one split, which was 100,0,0 when it was begun; found 50,50"
    ):
        build(tmp_path / "db", corpora, tokenizers, split="50,50")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"found one with thesis\.txt"):
        build(tmp_path / "mine", corpora, tokenizers)
    (tmp_path / "mine/thesis.txt").unlink()
    assert contents(tmp_path) == before


def test_a_dataset_that_changed_is_named(tokenizers, tmp_path):
    prefix = write_corpus(str(tmp_path / "a"), 8, 5)
    build(tmp_path / "db", [prefix], tokenizers)
    write_corpus(prefix, 8, 6)
    with pytest.raises(DataError, match=r"/a must be the dataset that .*/db points into; found another one"):
        ChunkDatabase(tmp_path / "db")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "damaged"), ('{"version": 9}', "must be of version 1; found version 9"), ("[]", "damaged")],
)
def test_a_damaged_description_is_named(tmp_path, text, message):
    (tmp_path / "database.json").write_text(text)
    with pytest.raises(DataError, match=rf"database\.json.*{message}"):
        ChunkDatabase(tmp_path)


def test_one_dataset_named_twice_is_there_once(corpora, tokenizers, tmp_path):
    os.symlink(corpora[1] + ".bin", tmp_path / "again.bin")
    os.symlink(corpora[1] + ".idx", tmp_path / "again.idx")
    lines = []
    found = build(tmp_path / "db", [corpora[1], str(tmp_path / "again")], tokenizers, notice=lines.append)
    assert len(found.description["datasets"]) == 1 and "again: the database has it once" in lines[0]


def test_data_without_text_is_an_error(tokenizers, tmp_path):
    from megalith.data.indexed import IndexedWriter

    with IndexedWriter(str(tmp_path / "a"), np.uint16) as writer:
        writer.add_sequence(np.array([EOD]))
        writer.end_document()
    with pytest.raises(DataError, match="found no chunk with text"):
        build(tmp_path / "db", [str(tmp_path / "a")], tokenizers)
    assert json.loads((tmp_path / "db/00000.json").read_text())["chunks"] == 0
