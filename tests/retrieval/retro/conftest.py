"""Two corpora, and a BERT that embeds them."""

import pytest

from tests.retrieval.retro.toy_retro import write_bert, write_corpus


@pytest.fixture(scope="session")
def blend(tmp_path_factory) -> list[str]:
    """The --data-path of two corpora."""
    folder = tmp_path_factory.mktemp("corpora")
    return ["0.7", write_corpus(str(folder / "a"), 30, 0), "0.3", write_corpus(str(folder / "b"), 9, 1)]


@pytest.fixture(scope="session")
def retro_bert(tmp_path_factory) -> str:
    """The folder of the BERT."""
    return write_bert(tmp_path_factory.mktemp("bert") / "bert")
