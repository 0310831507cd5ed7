"""One corpus for all tests of loss curves."""

import pytest

from tests.tiny import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """Prefix of the corpus."""
    return write_corpus(str(tmp_path_factory.mktemp("corpus") / "tiny"))
