"""One set of files for all tests of finetuning."""

import pathlib

import pytest

from tests.finetune.files import write_all


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> pathlib.Path:
    """The folder of the files."""
    return write_all(tmp_path_factory.mktemp("tasks"))
