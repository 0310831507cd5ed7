"""A corpus of sentences, and a bi-encoder that was trained on it for a few steps."""

import pytest

from megalith.testing import run_ranks
from megalith.training.pretrain import train
from tests.tiny import tiny_ict, write_sentences


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> str:
    """The prefix of a corpus."""
    return write_sentences(str(tmp_path_factory.mktemp("sentences") / "words"))


@pytest.fixture(scope="session")
def ict_run(sentences, tmp_path_factory) -> str:
    """The folder of the run."""
    folder = str(tmp_path_factory.mktemp("ict") / "run")
    run_ranks(train, 1, tiny_ict(sentences, folder, train_iters=3, eval_iters=0, lr_warmup_iters=1))
    return folder
