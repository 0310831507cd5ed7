"""Weights are read when asked for, and our own checkpoints go through them unchanged."""

import pytest
import torch

from megalith import checkpoint
from megalith.checkpoint.tensors.lazy import Lazy, cat
from megalith.checkpoint.weights import read_megalith, write
from megalith.common.errors import CheckpointError
from megalith.config.flags.loading import to_yaml
from megalith.config.run import RunConfig

CONFIG = RunConfig().replace(num_layers=3)


@pytest.fixture
def saved(tmp_path):
    state = {"model/a": torch.randn(3, 2), "model/b": torch.randn(4).bfloat16(), "optimizer/step/a": torch.tensor(2.0)}
    extra = tmp_path / "words.txt"
    extra.write_text("x")
    files = {"tokenizer/words.txt": extra}
    return checkpoint.save(
        tmp_path / "c", 5, state, train_state={"n": 1}, config_yaml=to_yaml(CONFIG), files=files
    ), state


def test_copy(saved, tmp_path):
    weights = read_megalith(saved[0])
    assert weights.config == CONFIG and weights.iteration == 5 and weights.train_state["n"] == 1
    copy = write(weights, tmp_path / "copy")
    assert checkpoint.verify(copy) == [] and (copy / "tokenizer/words.txt").read_text() == "x"
    for name, tensor in checkpoint.read_full(copy).items():
        assert torch.equal(tensor, saved[1][name]) and tensor.dtype == saved[1][name].dtype
    with pytest.raises(CheckpointError, match="is not empty; a converted checkpoint goes into a new folder"):
        write(weights, tmp_path / "copy")


def test_lazy():
    reads = []

    def read():
        reads.append(1)
        return torch.arange(6.0).view(2, 3)

    lazy = Lazy(shape=(2, 3), dtype=torch.float32, read=read)
    turned, both = lazy.t().to(torch.bfloat16), cat([lazy, lazy], 1)
    assert turned.shape == (3, 2) and turned.dtype == torch.bfloat16 and both.shape == (2, 6) and reads == []
    assert torch.equal(turned.read().float(), read().t()) and torch.equal(both.read(), torch.cat([read()] * 2, dim=1))
