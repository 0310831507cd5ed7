"""The list of weights: proportions by tokens and epochs, relative paths, errors that name the mistake."""

import numpy as np
import pytest

from megalith.common.errors import DataError
from megalith.data.indexed import IndexedWriter
from megalith.data.weights import corpus_of, write_weights


@pytest.fixture
def folder(tmp_path):
    sizes = {
        "wiki-0000_text_document": 100,
        "wiki-0001_text_document": 300,
        "books_text_document": 400,
        "web/page-0_text_sentence": 200,
    }
    for name, size in sizes.items():
        with IndexedWriter(tmp_path / "data" / name, np.uint16) as writer:
            writer.add_many(np.zeros(size, np.uint16), [size])
    return tmp_path


def lines(path):
    return [(float(w), p, c) for w, p, c in (line.split() for line in path.read_text().splitlines())]


def test_proportional_to_size(folder):
    entries = write_weights(str(folder / "data"), str(folder / "lists" / "list.txt"))
    assert [(entry.corpus, entry.files, entry.tokens, entry.proportion) for entry in entries] == [
        ("books", 1, 400, 0.4),
        ("wiki", 2, 400, 0.4),
        ("page", 1, 200, 0.2),
    ]
    assert lines(folder / "lists" / "list.txt") == [
        (0.4, "../data/books_text_document", "books"),
        (0.2, "../data/web/page-0_text_sentence", "page"),
        (0.1, "../data/wiki-0000_text_document", "wiki"),
        (0.3, "../data/wiki-0001_text_document", "wiki"),
    ]


def test_names_with_spaces(folder):
    with IndexedWriter(folder / "data" / "my corpus-0000", np.uint16) as writer:
        writer.add_many(np.zeros(9, np.uint16), [9])
    with pytest.raises(DataError, match=r"without spaces.*'my corpus'"):
        write_weights(str(folder / "data"), str(folder / "list.txt"))


def test_a_corpus_that_yaml_takes_for_a_number(tmp_path):
    with IndexedWriter(tmp_path / "2020-0000", np.uint16) as writer:
        writer.add_many(np.zeros(9, np.uint16), [9])
    assert write_weights(str(tmp_path), str(tmp_path / "list.txt"), {2020: 2})[0].epochs == 2  # type: ignore[dict-item]


def test_epochs(folder):
    write_weights(str(folder / "data"), str(folder / "list.txt"), {"wiki": 2, "books": 0, "default": 1})
    got = {path: weight for weight, path, _ in lines(folder / "list.txt")}
    assert got == {
        "data/web/page-0_text_sentence": 0.2,
        "data/wiki-0000_text_document": 0.2,
        "data/wiki-0001_text_document": 0.6,
    }
    by_directory = write_weights(
        str(folder / "data"), str(folder / "list.txt"), {"data": 1, "web": 0.5}, by_directory=True
    )
    assert [(entry.corpus, entry.tokens, round(entry.proportion, 3)) for entry in by_directory] == [
        ("data", 800, 0.889),
        ("web", 200, 0.111),
    ]


@pytest.mark.parametrize(
    ("epochs", "text"),
    [
        ({"wiki": 1}, "books, page"),
        ({"wikki": 1, "default": 1}, "wikki"),
        ({"wiki": -1, "default": 1}, "number"),
        ({"default": 0}, "0 tokens"),
    ],
)
def test_faults(folder, epochs, text):
    with pytest.raises(DataError, match=text):
        write_weights(str(folder / "data"), str(folder / "list.txt"), epochs)
    assert not (folder / "list.txt").exists()


@pytest.mark.parametrize(
    ("name", "corpus"),
    [
        ("wiki-0003_text_document", "wiki"),
        ("cc_en-7", "cc_en"),
        ("my-gpt2_text_document", "my"),
        ("books_body_sentence", "books"),
        ("plain", "plain"),
    ],
)
def test_corpus_of(name, corpus):
    assert corpus_of(f"/data/{name}") == corpus
