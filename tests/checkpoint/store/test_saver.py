"""Saving behind the training's back: what was staged is what is saved, and errors surface at the next call."""

import os
import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megalith import checkpoint
from megalith.checkpoint.store import dcp as store
from megalith.checkpoint.store import folder as folders
from megalith.checkpoint.store.saver import Saver
from megalith.common.errors import CheckpointError


def test_later_changes_are_not_saved_and_buffers_are_reused(tmp_path):
    state = {"model/a": torch.zeros(1000), "model/view": torch.arange(10.0)[::2], "optimizer/step/a": torch.tensor(0.0)}
    before: list[int] = []
    with Saver(tmp_path, keep_last=2) as saver:
        assert saver.wait() is None
        for iteration in range(1, 5):
            state["model/a"].fill_(iteration)
            saver.save(iteration, state, train_state={"n": iteration}, config_yaml="")
            now = [buffer.data_ptr() for buffer in saver.buffers.values()]
            state["model/a"].fill_(-1)
            assert before in ([], now)
            before = now
        assert saver.wait() == tmp_path / "iter_0000004"
        assert saver.wait() is None
    for iteration in (3, 4):
        path = checkpoint.find(tmp_path, iteration)
        found = checkpoint.read_full(path)
        assert (found["model/a"] == iteration).all() and found["model/view"].tolist() == [0, 2, 4, 6, 8]
        assert checkpoint.read_train_state(path)["n"] == iteration
    assert checkpoint.iterations(tmp_path) == [3, 4]


def test_the_pointer_waits_for_the_disk(tmp_path, monkeypatch):
    go, publish = threading.Event(), folders.publish
    monkeypatch.setattr(folders, "publish", lambda *arguments: go.wait(60) and publish(*arguments))
    with Saver(tmp_path) as saver:
        saver.save(1, {"model/a": torch.ones(3)}, train_state={}, config_yaml="")
        assert checkpoint.latest(tmp_path) is None and checkpoint.iterations(tmp_path) == []
        go.set()
        saver.wait()
        assert checkpoint.latest(tmp_path) == 1


def test_errors_surface_at_the_next_call(tmp_path, monkeypatch):
    saver = Saver(tmp_path)
    saver.save(1, {"model/a": torch.ones(3)}, train_state={}, config_yaml="")
    saver.wait()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store._HashingFile, "write", full)
        saver.save(2, {"model/a": torch.ones(3)}, train_state={}, config_yaml="")
        with pytest.raises(CheckpointError, match="No space left"):
            saver.save(3, {"model/a": torch.ones(3)}, train_state={}, config_yaml="")
    assert sorted(os.listdir(tmp_path)) == ["iter_0000001", "latest"]
    saver.save(3, {"model/a": torch.ones(3)}, train_state={}, config_yaml="")
    saver.close()
    assert checkpoint.latest(tmp_path) == 3


def train_and_save(folder):
    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(torch.zeros(5, 4), mesh, [Shard(0)])
    with Saver(folder) as saver:
        assert saver.ranks.group is not dist.group.WORLD
        for iteration in range(1, 4):
            weight.to_local().fill_(iteration)
            saver.save(iteration, {"model/a": weight}, train_state={}, config_yaml="")
            weight.to_local().fill_(-1)
            for _ in range(20):  # the training's own collectives go on meanwhile
                dist.all_reduce(torch.ones(100))
    return weight.shape


@pytest.mark.slow
def test_beside_collectives(tmp_path, ranks):
    ranks(train_and_save, 2, str(tmp_path))
    for iteration in (1, 2, 3):
        assert torch.equal(
            checkpoint.read_full(checkpoint.find(tmp_path, iteration))["model/a"], torch.full((5, 4), float(iteration))
        )
