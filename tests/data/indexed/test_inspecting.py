"""Inspect: what is in a dataset, what is wrong with it."""

import pathlib

import numpy as np
import pytest

from megalith.common.errors import DataError
from megalith.data.indexed import IndexedWriter
from megalith.data.indexed.inspecting import describe, document_text, prefixes_below, verify
from megalith.data.tokenizers.tokenizer import build_tokenizer

SHARED = pathlib.Path(__file__).parents[3].parent / "shared" / "data"


@pytest.fixture
def dataset(tmp_path):
    with IndexedWriter(tmp_path / "a_text_document", np.uint16) as writer:
        for row in ([5, 6, 7], [8], []):
            writer.add_sequence(row)
        writer.end_document()
        writer.end_document()
    return str(tmp_path / "a_text_document")


def test_describe(dataset):
    facts = describe(dataset)
    assert {
        key: facts[key]
        for key in ("num_sequences", "num_documents", "total_num_tokens", "size", "dtype", "empty_documents")
    } == {
        "num_sequences": 3,
        "num_documents": 2,
        "total_num_tokens": 4,
        "size": 8,
        "dtype": "uint16",
        "empty_documents": 1,
    }
    assert (facts["shortest_sequence"], facts["longest_sequence"]) == (0, 3)


def test_verify(dataset):
    found = verify(dataset, vocab_size=9)
    assert found["largest_token"] == 8 and len(found["sha256.bin"]) == 64
    with pytest.raises(DataError, match="token 8 in sequence 1"):
        verify(dataset, vocab_size=8)
    with open(dataset + ".idx", "r+b") as file:
        file.seek(34)
        file.write(b"\x02")
    with pytest.raises(DataError, match="damaged"):
        verify(dataset)


def test_show(dataset):
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=10)
    assert document_text(dataset, 0, tokenizer) == document_text(dataset, -2) == "5 6 7\n8\n"
    assert document_text(dataset, 0, limit=2) == "5 6\n..."
    assert document_text(dataset, 1) == ""
    with pytest.raises(DataError, match="documents 0 to 1"):
        document_text(dataset, 2)


def test_prefixes(dataset, tmp_path):
    assert prefixes_below(str(tmp_path)) == [dataset]
    assert prefixes_below("some/prefix") == ["some/prefix"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.idx"):
        prefixes_below(str(tmp_path / "empty"))


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_old_formats():
    for kind in ("lazy", "cached"):
        prefix = str(SHARED / f"megatron/indexed/old22-gpt2bpe-{kind}")
        facts = describe(prefix)
        assert facts["format"].startswith("lazy") and facts["total_num_tokens"] == 102014
        assert verify(prefix, 50257)["largest_token"] == 50256
