"""Merge and split: the documents in order, whatever the pieces; Megatron's bytes."""

import os
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import DataError
from megalith.common.locks import LockedError, locked
from megalith.data.indexed import IndexedDataset, IndexedWriter
from megalith.data.indexed.merge import directory_prefixes, merge_datasets, split_datasets

SHARED = pathlib.Path(__file__).parents[3].parent / "shared" / "data"


def write(prefix, documents, dtype=np.uint16, modes=None):
    with IndexedWriter(prefix, dtype, multimodal=modes is not None) as writer:
        for document in documents:
            for row in document:
                writer.add_sequence(row, *([modes] if modes is not None else []))
            writer.end_document()
    return str(prefix)


def read(prefix):
    data = IndexedDataset(prefix)
    starts = data.document_indices
    return [[data[i].tolist() for i in range(starts[d], starts[d + 1])] for d in range(data.num_documents)]


def content(prefix):
    return [pathlib.Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


CORPUS = st.lists(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=3), max_size=6)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(CORPUS, min_size=1, max_size=4), st.sampled_from(["tokens", "documents", "size"]), st.integers(1, 30))
def test_split_then_merge_gives_the_documents_back(corpora, unit, limit):
    folder = pathlib.Path(tempfile.mkdtemp())
    prefixes = [write(folder / f"in{i}", corpus) for i, corpus in enumerate(corpora)]
    documents = [document for corpus in corpora for document in corpus]
    merge_datasets(prefixes, str(folder / "merged"))
    assert read(folder / "merged") == documents
    assert content(folder / "merged") == content(write(folder / "direct", documents))
    pieces = split_datasets(prefixes, str(folder / "piece"), **{unit: limit})
    assert pieces == [f"{folder}/piece-{i:04d}" for i in range(len(pieces))]
    for piece in pieces:
        data = IndexedDataset(piece)
        held = {"tokens": data.num_tokens, "documents": data.num_documents, "size": data.bin_bytes}[unit]
        assert held <= limit or sum(any(map(len, document)) for document in read(piece)) == 1
    merge_datasets(pieces, str(folder / "again"))
    assert content(folder / "again") == content(folder / "merged")
    shutil.rmtree(folder)


def test_modes_are_merged(tmp_path):
    a = write(tmp_path / "a", [[[1], [2]]], modes=1)
    b = write(tmp_path / "b", [[[3]]], modes=2)
    merge_datasets([a, b], str(tmp_path / "c"))
    assert IndexedDataset(tmp_path / "c").modes.tolist() == [1, 1, 2]
    with pytest.raises(DataError, match="multimodal"):
        merge_datasets([a, write(tmp_path / "d", [[[1]]])], str(tmp_path / "e"))


@pytest.mark.slow
def test_more_files_than_may_be_open(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    prefixes = [write(tmp_path / f"in{i:03}", [[[i]]]) for i in range(100)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (80, hard))
        merge_datasets(prefixes, str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read(tmp_path / "out") == [[[i]] for i in range(100)]


def test_unlike_datasets_do_not_merge(tmp_path):
    a, b = write(tmp_path / "a", [[[1]]]), write(tmp_path / "b", [[[1]]], np.int32)
    with pytest.raises(DataError, match=r"uint16.*int32"):
        merge_datasets([a, b], str(tmp_path / "c"))
    assert not list(tmp_path.glob("c*")) and not list(tmp_path.glob(".c*"))
    with pytest.raises(DataError, match="0"):
        merge_datasets([], str(tmp_path / "c"))


def test_directory(tmp_path):
    write(tmp_path / "b", [[[1]]])
    write(tmp_path / "a", [[[1]]])
    (tmp_path / "notes.txt").write_text("a stray file is no reason to stop")
    assert directory_prefixes(str(tmp_path)) == [str(tmp_path / "a"), str(tmp_path / "b")]
    (tmp_path / "c.bin").write_bytes(b"")
    with pytest.raises(DataError, match="no partner"):
        directory_prefixes(str(tmp_path))
    (tmp_path / "c.bin.idx").write_bytes(b"")
    with pytest.raises(DataError, match="mv "):
        directory_prefixes(str(tmp_path))
    (tmp_path / "empty").mkdir()
    for path in ("empty", "absent"):
        with pytest.raises(DataError, match="--input"):
            directory_prefixes(str(tmp_path / path))


def test_what_an_earlier_call_wrote_is_not_taken_again(tmp_path):
    write(tmp_path / "a", [[[1]], [[2]], [[3]]])
    for name in ("all", "piece-0003"):
        write(tmp_path / name, [[[1]]])
        with pytest.raises(DataError, match=f"twice.*{name}"):
            directory_prefixes(str(tmp_path), str(tmp_path / name.partition("-")[0]))
    out = str(tmp_path / "out" / "piece")
    assert len(split_datasets([str(tmp_path / "a")], out, documents=1)) == 3
    with pytest.raises(DataError, match=r"earlier split.*piece-0000"):
        split_datasets([str(tmp_path / "a")], out, documents=2)


def test_split_that_meets_another_writer_touches_nothing(tmp_path):
    source = write(tmp_path / "a", [[[1]], [[2]], [[3]]])
    with locked(tmp_path / "piece-0001"), pytest.raises(LockedError, match="piece-0001"):
        split_datasets([source], str(tmp_path / "piece"), documents=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_split_replaces_and_removes_only_what_a_split_made(tmp_path):
    source, other = write(tmp_path / "a", [[[1]], [[2]], [[3]]]), write(tmp_path / "piece-2024", [[[9]]])
    for count in (1, 3):  # three files, then one
        made = split_datasets([source], str(tmp_path / "piece"), documents=count, overwrite=True)
    assert len(made) == 1 and not (tmp_path / "piece-0001.bin").exists() and read(other) == [[[9]]]
    write(tmp_path / "late-0001", [[[9]]])  # there when the split writes, though it did not begin with 0
    with pytest.raises(DataError, match=r"late-0001.bin exists"):
        split_datasets([source], str(tmp_path / "late"), documents=1)
    assert not (tmp_path / "late-0000.bin").exists() and read(tmp_path / "late-0001") == [[[9]]]


@pytest.mark.parametrize("limits", [{}, {"tokens": 1, "documents": 1}, {"tokens": -1}])
def test_split_needs_one_limit(tmp_path, limits):
    with pytest.raises(DataError, match="Exactly one"):
        split_datasets([write(tmp_path / "a", [[[1]]])], str(tmp_path / "b"), **limits)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_megatrons_file_survives(tmp_path):
    source = str(SHARED / "megatron/indexed/old22-gpt2bpe")
    pieces = split_datasets([source], str(tmp_path / "piece"), documents=50)
    assert [IndexedDataset(piece).num_documents for piece in pieces] == [50, 50, 20]
    merge_datasets(pieces, str(tmp_path / "whole"))
    assert content(tmp_path / "whole") == content(source)


@pytest.mark.parametrize("writer", ["merge", "IndexedWriter"])
def test_killed_between_the_two_files_no_index_is_left_to_other_data(tmp_path, monkeypatch, writer):
    """Both have as many tokens: the old index would fit the new data, and cut it wrongly."""
    write(tmp_path / "out", [[[1, 2, 3]], [[4]]])
    other, real = write(tmp_path / "a", [[[5]], [[6, 7, 8]]]), os.replace

    def killed(source, target):
        if str(target).endswith("out.idx"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        merge_datasets([other], str(tmp_path / "out")) if writer == "merge" else write(
            tmp_path / "out", [[[5]], [[6, 7, 8]]]
        )
    with pytest.raises(DataError, match="no partner"):
        IndexedDataset(tmp_path / "out")
