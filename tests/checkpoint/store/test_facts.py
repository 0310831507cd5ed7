"""What a checkpoint says of itself; and that looking at one does not import torch."""

import subprocess
import sys

import pytest
import torch

from megalith import checkpoint
from megalith.common.errors import CheckpointError


@pytest.fixture
def path(tmp_path):
    state = {
        "model/a": torch.ones(3, 4),
        "model/b": torch.ones(5),
        "optimizer/exp_avg/a": torch.ones(3, 4),
        "optimizer/step/a": torch.tensor(1.0),
    }
    return checkpoint.save(tmp_path, 7, state, train_state={"lr": 0.5}, config_yaml="model: {num_layers: 1}\n")


def test_describe(path):
    facts = checkpoint.describe(path)
    assert facts["iteration"] == 7 and facts["parameters"] == {
        "model": 17,
        "optimizer/exp_avg": 12,
        "optimizer/step": 1,
    }
    assert facts["tensors"]["model/a"] == {"shape": [3, 4], "dtype": "float32"} and facts["bytes"] > 4 * 30
    assert checkpoint.read_train_state(path)["lr"] == 0.5 and checkpoint.read_config(path) == "model: {num_layers: 1}\n"


def test_unreadable(path):
    (path / "train_state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"train_state.json is damaged"):
        checkpoint.read_train_state(path)
    (path / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"config.yaml cannot be read"):
        checkpoint.read_config(path)


def test_a_config_that_was_changed_since(path):
    """Its size stays, so a glance at the files does not see it; what it says is no longer what the tensors are."""
    (path / "config.yaml").write_text("model: {num_layers: 2}\n")
    with pytest.raises(CheckpointError, match=r"config.yaml is damaged: its SHA-256 is .*Copy the checkpoint again"):
        checkpoint.read_config(path)


def test_looking_needs_no_torch(path):
    code = (
        "import sys; from megalith import checkpoint as c; p = c.find(sys.argv[1]);"
        "assert not c.verify(p) and c.latest(p.parent) == 7;"
        "c.describe(p), c.iterations(p.parent), c.read_config(p), c.read_train_state(p);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path.parent)], check=True)


def test_words():
    assert all(callable(getattr(checkpoint, word)) for word in checkpoint.__all__ if word != "edit")
    assert callable(checkpoint.save)  # and still the function after its module was imported
    with pytest.raises(AttributeError, match="it has Saver, describe"):
        checkpoint.nothing  # noqa: B018
