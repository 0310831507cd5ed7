"""One corpus for all tests of loss curves, and a real one."""

import pathlib

import pytest

from megalith.cli.main import main
from tests.tiny import write_corpus, write_sentences


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """Prefix of the corpus."""
    return write_corpus(str(tmp_path_factory.mktemp("corpus") / "tiny"))


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> str:
    """Prefix of the corpus split into sentences."""
    return write_sentences(str(tmp_path_factory.mktemp("sentences") / "tiny"))


@pytest.fixture(scope="session")
def articles(tmp_path_factory) -> list[str]:
    """Flags that name real articles as sentences of WordPiece, and the vocabulary."""
    shared = pathlib.Path(__file__).parents[3] / "shared" / "data"
    if not shared.exists():
        pytest.skip("needs the data of ../shared, which is not part of the project")
    prefix = tmp_path_factory.mktemp("articles") / "articles"
    vocabulary = ["--vocab-file", str(shared / "bert/bert-base-uncased-vocab.txt")]
    text = str(shared / "loose_json/wikitext2_test_articles.jsonl")
    words = [
        "data",
        "preprocess",
        "--input",
        text,
        "--output-prefix",
        str(prefix),
        "--split-sentences",
        "--workers",
        "1",
    ]
    assert main([*words, "--tokenizer-type", "BertWordPieceLowerCase", *vocabulary]) == 0
    return [*vocabulary, "--data-path", f"{prefix}_text_sentence"]
