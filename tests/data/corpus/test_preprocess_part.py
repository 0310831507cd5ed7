"""Parts: end-of-document and BOS tokens, dropped documents, records that cannot lie."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.corpus.preprocess_part import (
    BadDocument,
    Job,
    PartEncoder,
    assemble,
    document_sums,
    finished_parts,
    part_prefix,
)
from megalith.data.corpus.readers import Part, Slice
from megalith.data.indexed import IndexedDataset

DOCUMENTS = st.lists(
    st.tuples(st.lists(st.lists(st.integers(1, 99), max_size=4), max_size=4), st.booleans()), max_size=8
)


@settings(max_examples=300, deadline=None)
@given(DOCUMENTS, st.booleans(), st.booleans())
def test_assemble_equals_the_loop(documents, with_eod, with_bos):
    eod, bos = (100 if with_eod else None), (101 if with_bos else None)
    rows = [row for document, _ in documents for row in document]
    ids = np.array([i for row in rows for i in row], np.uint32)
    lengths = np.array([len(row) for row in rows], np.int64)
    per_document = np.array([len(document) for document, _ in documents], np.int64)
    sums = document_sums(lengths, per_document)
    assert sums.tolist() == [sum(map(len, document)) for document, _ in documents]
    keep = np.array([wanted for _, wanted in documents], bool) & (sums > 0)
    expected = []
    for kept, (document, _) in zip(keep, documents):
        if kept:
            sentences = [list(row) for row in document if row]
            if eod:
                sentences[-1].append(eod)
            if bos:
                sentences[0].insert(0, bos)
            expected.append(sentences)
    got_ids, got_lengths, got_documents = assemble(ids, lengths, per_document, keep=keep, eod=eod, bos=bos)
    assert got_ids.tolist() == [i for document in expected for row in document for i in row]
    assert got_lengths.tolist() == [len(row) for document in expected for row in document]
    assert got_documents.tolist() == [len(document) for document in expected]


def job(folder, **changes):
    settings = {
        "keys": ("text",),
        "fast": False,
        "split_sentences": False,
        "language": "english",
        "keep_newlines": False,
    }
    settings |= {"append_eod": False, "prepend_bos": False, "fail": False, "dtype": "uint16"} | changes
    return Job(folder=str(folder), tokenizer={"tokenizer_type": "NullTokenizer", "vocab_size": 1000}, **settings)


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text, "title": text[:1]}) + "\n" for text in texts))
    return Part(3, (Slice(str(path), 0, path.stat().st_size),), path.stat().st_size)


def test_a_part_is_a_dataset_and_a_record(tmp_path):
    part = write_lines(tmp_path / "a.jsonl", ["1 2 3", "", "4"])
    record = PartEncoder(job(tmp_path, append_eod=True))(part)
    data = IndexedDataset(part_prefix(str(tmp_path), 3, 0))
    assert [data[i].tolist() for i in range(len(data))] == [[1, 2, 3, 1000], [4, 1000]]
    assert (record["documents"], record["tokens"], record["num_problems"]) == (2, 6, 1)
    assert record["problems"] == [[0, 2, "empty document"]]
    assert list(finished_parts(str(tmp_path), ["text"])) == [3]


def test_a_document_empty_in_one_key_is_dropped_in_all(tmp_path):
    part = write_lines(tmp_path / "a.jsonl", ["1 2", "", "3"])
    PartEncoder(job(tmp_path, keys=("title", "text")))(part)
    rows = [[row.tolist() for row in IndexedDataset(part_prefix(str(tmp_path), 3, i))[:]] for i in (0, 1)]
    assert rows == [[[1], [3]], [[1, 2], [3]]]


def test_fail_stops_at_the_first(tmp_path):
    part = write_lines(tmp_path / "a.jsonl", ["1", "", ""])
    with pytest.raises(BadDocument) as caught:
        PartEncoder(job(tmp_path, fail=True))(part)
    assert (caught.value.line, caught.value.reason) == (2, "empty document")
    assert not list(tmp_path.glob(".*tmp*")) and not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("damage", ["bin", "idx", "record", "gone"])
def test_a_record_is_not_believed_blindly(tmp_path, damage):
    PartEncoder(job(tmp_path))(write_lines(tmp_path / "a.jsonl", ["1 2", "3"]))
    prefix = part_prefix(str(tmp_path), 3, 0)
    if damage == "record":
        (tmp_path / "000003.json").write_text("{")
    elif damage == "gone":
        (tmp_path / "000003-0.bin").unlink()
    else:
        with open(f"{prefix}.{damage}", "r+b") as file:
            file.seek(2)
            file.write(b"\x07")
    assert finished_parts(str(tmp_path), ["text"]) == {}
    assert not (tmp_path / "000003.json").exists()
