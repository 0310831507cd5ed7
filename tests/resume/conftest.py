"""One corpus for all tests of resuming."""

import pytest

from tests.tiny import write_corpus, write_sentences


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """Prefix of the corpus."""
    return write_corpus(str(tmp_path_factory.mktemp("corpus") / "tiny"))


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> str:
    """Prefix of the corpus split into sentences."""
    return write_sentences(str(tmp_path_factory.mktemp("sentences") / "tiny"))
