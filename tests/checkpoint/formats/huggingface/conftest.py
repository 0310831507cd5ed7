"""Saved models of transformers that the tests of this folder convert."""

import pathlib
from collections.abc import Callable

import pytest
import torch

from tests.originals.families import MODELS


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> Callable[[str], pathlib.Path]:
    """`folder(name)`: a saved model of a family at toy size."""

    def save(name: str) -> pathlib.Path:
        torch.manual_seed(0)
        MODELS[name]().save_pretrained(tmp_path / "theirs")
        return tmp_path / "theirs"

    return save
