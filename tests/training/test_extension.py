"""A dataset and a loss from a user's own module, by `module:name`, without a fork."""

import sys

import pytest

from tests.tiny import losses, tiny_config

MODULE = '''
import numpy as np


class Squares:
    """Sample i counts up in steps of i % 3 + 1."""

    def __init__(self, indexed, documents, num_samples, *, config, **given):
        self.length, self.size = config.data.seq_length, num_samples

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        ids = (i + np.arange(self.length + 1) * (i % 3 + 1)) % 40
        mask, positions = np.ones(self.length, np.float32), np.arange(self.length)
        return {"input_ids": ids[:-1], "labels": ids[1:], "loss_mask": mask, "positions": positions}


class Focal:
    """Loss to the power of 1.5: not a sum, so the model must not be given weights."""

    def counts(self, batch):
        return {"focal loss": batch["loss_mask"].sum()}

    def inputs(self, batch, counts):
        return {"inputs": batch["input_ids"], "labels": batch["labels"], "positions": batch["positions"]}

    def losses(self, output, batch, counts):
        return {"focal loss": (output.clamp(min=1e-6) ** 1.5 * batch["loss_mask"]).sum() / counts["focal loss"]}
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "user_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "user_module"
    sys.modules.pop("user_module", None)


def test_own_dataset_and_loss(module, corpus, tmp_path):
    from megalith.training.pretrain import train

    config = tiny_config(
        corpus, str(tmp_path / "run"), dataset=f"{module}:Squares", loss=f"{module}:Focal", train_iters=30, eval_iters=0
    )
    train(config)
    found = losses(str(tmp_path / "run"))
    assert found[0] > 6.0, "3.9 to the power of 1.5"
    assert found[-1] < 0.75 * found[0]


def test_a_wrong_name_is_reported(corpus, tmp_path):
    from megalith.common.errors import ConfigError
    from megalith.training.pretrain import train

    with pytest.raises(ConfigError, match="Python path"):
        train(tiny_config(corpus, str(tmp_path / "run"), loss="no_such_module:Loss"))


def test_a_run_without_validation_data_says_so(corpus, tmp_path, capsys):
    from megalith.training.pretrain import train

    train(tiny_config(corpus, str(tmp_path / "run"), split="1", train_iters=2, lr_warmup_iters=1))
    assert "no validation data" in capsys.readouterr().out
