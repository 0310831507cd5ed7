"""Saving: bit-exact, all or nothing, on one rank and many; killed at any moment it loses nothing."""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from megalith import checkpoint
from megalith.checkpoint.store import folder as folders
from megalith.common.errors import CheckpointError


def tensors(seed=0):
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 10, generator=draw)
    return {
        "model/matrix": matrix,
        "model/transposed": torch.randn(7, 5, generator=draw).t(),
        "model/view": matrix[2:4, 3:],
        "model/half": torch.randn(9, generator=draw).bfloat16(),
        "model/empty": torch.empty(0, 3),
        "optimizer/step/matrix": torch.tensor(float(seed)),
        "optimizer/mask/matrix": torch.randint(0, 2, (3, 3), generator=draw).bool(),
        "optimizer/exp_avg/matrix": torch.randn(6, 10, generator=draw, dtype=torch.float64) / 3,
        "optimizer/count/matrix": torch.randint(-(2**62), 2**62, (4,), generator=draw),
    }


def save(folder, iteration, state, train_state=None, **options):
    return checkpoint.save(
        folder, iteration, state, train_state=train_state or {}, config_yaml="model: {}\n", **options
    )


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def test_round_trip_is_bit_exact(tmp_path):
    state, extra = tensors(), tmp_path / "vocab.json"
    state["model/odd"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
    extra.write_text("{}")
    path = save(
        tmp_path / "c",
        100,
        state,
        {"consumed_train_samples": 6400, "loss_scale": [1.0]},
        files={"tokenizer.json": extra},
    )
    assert path == tmp_path / "c" / "iter_0000100" and (path / "tokenizer.json").read_text() == "{}"
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    train_state = checkpoint.load(tmp_path / "c", found)
    assert (
        train_state["iteration"] == 100 and train_state["consumed_train_samples"] == 6400 and train_state["ranks"] == 1
    )
    bits = {name: (a.contiguous().view(torch.uint8) if a.dim() else a) for name, a in state.items()}
    assert same(bits, {name: (a.contiguous().view(torch.uint8) if a.dim() else a) for name, a in found.items()})
    assert checkpoint.verify(path) == [] and checkpoint.read_config(path) == "model: {}\n"
    assert json.loads((path / "train_state.json").read_text())["versions"]["torch"] == torch.__version__


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_torch_reads_it(tmp_path):
    state = tensors()
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(found, checkpoint_id=save(tmp_path, 1, state))
    assert same(state, found)


def test_saving_again_replaces(tmp_path):
    save(tmp_path, 5, tensors(0))
    path = save(tmp_path, 5, tensors(1))
    assert same(checkpoint.read_full(path), tensors(1)) and sorted(os.listdir(tmp_path)) == ["iter_0000005", "latest"]


def test_retention(tmp_path):
    for iteration in range(10, 70, 10):
        save(tmp_path, iteration, {"model/a": torch.ones(1)}, keep_last=2, keep_every=30)
    assert checkpoint.iterations(tmp_path) == [30, 50, 60] and checkpoint.latest(tmp_path) == 60


def test_stages_of_one_rank(tmp_path):
    first, last = (
        {"model/tied": torch.arange(4), "model/a": torch.ones(2)},
        {"model/tied": torch.arange(4), "model/b": torch.ones(3)},
    )
    path = save(tmp_path, 1, [first, last])
    assert same(checkpoint.read_full(path), first | last)
    into = [{name: torch.zeros_like(tensor) for name, tensor in stage.items()} for stage in (first, last)]
    checkpoint.load(tmp_path, into)
    assert same(into[0], first) and same(into[1], last)
    last["model/tied"][2] = 7
    with pytest.raises(CheckpointError, match="two stages of this rank hold copies that differ of model/tied"):
        save(tmp_path, 2, [first, last])
    assert checkpoint.iterations(tmp_path) == [1]


@pytest.mark.parametrize(
    "bad", [{"train_state": {"a": object()}}, {"files": {"manifest.json": __file__}}, {"files": {"../b": __file__}}]
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, bad):
    with pytest.raises(CheckpointError, match="was not saved"):
        save(tmp_path, 1, tensors(), **bad)
    assert os.listdir(tmp_path) == []


def test_negative_iteration(tmp_path):
    with pytest.raises(CheckpointError, match="iteration must be at least 0; found -1"):
        save(tmp_path, -1, tensors())


def test_foreign_folder_is_not_replaced(tmp_path):
    (tmp_path / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is not a checkpoint of megalith"):
        save(tmp_path, 1, tensors())
    assert (tmp_path / "iter_0000001" / "mp_rank_00").is_dir()


@contextlib.contextmanager
def disk_full_after(size):
    """Files of this process cannot grow beyond `size` bytes: the write fails in the middle, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_disk_full(tmp_path):
    state = {"model/a": torch.randn(50_000), "model/b": torch.randn(60_000)}
    save(tmp_path, 1, state)
    with (
        disk_full_after(100_000),
        pytest.raises(CheckpointError, match=r"iter_0000002 was not saved: .*File too large.*distcp.*untouched"),
    ):
        save(tmp_path, 2, state)
    assert (
        sorted(os.listdir(tmp_path)) == ["iter_0000001", "latest"]
        and checkpoint.verify(checkpoint.find(tmp_path)) == []
    )
    save(tmp_path, 2, state)
    assert checkpoint.latest(tmp_path) == 2


def test_bytes_changed_on_their_way_to_the_disk(tmp_path, monkeypatch):
    claim = folders.claim

    def spoil(folder, iteration):
        path, lock = claim(folder, iteration)
        monkeypatch.setattr(
            os, "fsync", lambda descriptor: os.pwrite(descriptor, b"X", 70) if fits(descriptor, path) else None
        )
        return path, lock

    def fits(descriptor, path):
        return os.readlink(f"/proc/self/fd/{descriptor}").endswith("__0_0.distcp")

    monkeypatch.setattr(folders, "claim", spoil)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged"):
        save(tmp_path, 1, tensors())
    assert os.listdir(tmp_path) == []


# --- several ranks ---


def one_rank_fails(folder):
    rank = dist.get_rank()
    state = {f"model/{rank}": torch.full((40_000,), float(rank)), "model/all": torch.arange(5)}
    save(folder, 1, state)
    with disk_full_after(100_000) if rank == 1 else contextlib.nullcontext():
        try:
            save(folder, 2, state)
        except CheckpointError as error:
            message = str(error)
    save(folder, 3, state)
    return message


def test_failure_of_one_rank_is_everyones(tmp_path, ranks):
    messages = ranks(one_rank_fails, 3, str(tmp_path))
    assert len(set(messages)) == 1 and "rank 1: OSError" in messages[0] and "__1_" in messages[0]
    assert checkpoint.iterations(tmp_path) == [1, 3] and not list(tmp_path.glob(".iter*"))
    found = checkpoint.read_full(checkpoint.find(tmp_path))
    assert all((found[f"model/{rank}"] == rank).all() for rank in range(3)) and found["model/all"].tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


def disagreements(folder):
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    cases = {
        "copies that differ": lambda: save(folder, 1, {"model/a": torch.tensor([1.0, float(rank)])}),
        "differs between two ranks": lambda: save(folder, 1, {"model/a": torch.ones(2 + rank)}),
        "disagree on what to save where": lambda: save(folder, rank, {}),
        "artial": lambda: save(folder, 1, {"model/a": DTensor.from_local(torch.ones(4), mesh, [Partial()])}),
        "tied": lambda: save(folder, 1, {"model/tied": on_own_mesh(torch.tensor([3.0, float(rank)]))}),
    }
    messages = {}
    for name, call in cases.items():
        with pytest.raises(CheckpointError) as caught:
            call()
        messages[name] = str(caught.value)
    save(folder, 1, {"model/tied": on_own_mesh(torch.tensor([3.0, 4.0])), "model/plain": torch.ones(2)})
    return messages


def on_own_mesh(tensor):
    """A DTensor on a mesh of this rank only, as the pipeline stages at both ends hold their tied weight."""
    meshes = [dist.device_mesh.DeviceMesh("cpu", [rank]) for rank in range(dist.get_world_size())]
    return distribute_tensor(tensor, meshes[dist.get_rank()], [Shard(0)])


def test_ranks_that_disagree(tmp_path, ranks):
    first, second = ranks(disagreements, 2, str(tmp_path))
    assert all(name in message for messages in (first, second) for name, message in messages.items())
    assert "ranks 0 and 1" in first["tied"] and "model/tied" in first["tied"]
    assert checkpoint.read_full(checkpoint.find(tmp_path))["model/tied"].tolist() == [3.0, 4.0]


# --- kill -9 ---


def save_forever(folder, start):
    state = tensors()
    for iteration in range(start, 10**6):
        state["optimizer/step/matrix"].fill_(iteration)
        save(folder, iteration, state, {"check": iteration}, keep_last=2)


def check_everything(folder):
    """Every checkpoint that a reader would find is complete and is what its number says; returns the latest."""
    for iteration in checkpoint.iterations(folder):
        path = checkpoint.find(folder, iteration)
        assert checkpoint.verify(path) == []
        assert checkpoint.read_full(path, ["optimizer/step/matrix"])["optimizer/step/matrix"] == iteration
        assert checkpoint.read_train_state(path)["check"] == iteration
    return checkpoint.latest(folder)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "torch.distributed.tensor"])
    draw, last, moments = random.Random(1), -1, []
    for _ in range(25):
        process = context.Process(target=save_forever, args=(tmp_path, last + 1))
        process.start()
        until = time.monotonic() + 60
        while (found := checkpoint.latest(tmp_path)) in (None, last) and time.monotonic() < until:
            # The first save of this life is through: what follows is killed anywhere in the next ones
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.08))
        process.kill()
        process.join()
        moments.append(sorted({path.name.rpartition(".")[2] for path in tmp_path.glob(".iter*")}))
        found = check_everything(tmp_path)
        assert found is not None and found > last
        last = found
    assert ["saving"] in moments  # some kills did strike in the middle
    save(
        tmp_path,
        last + 1,
        tensors() | {"optimizer/step/matrix": torch.tensor(last + 1.0)},
        {"check": last + 1},
        keep_last=2,
    )
    assert (
        check_everything(tmp_path) == last + 1
        and not list(tmp_path.glob(".iter*"))
        and len(checkpoint.iterations(tmp_path)) <= 3
    )
