"""One run at a time writes a folder, and replaces nothing that another one wrote."""

import json
import pathlib

import pytest

from megalith import checkpoint
from megalith.common.errors import CheckpointError
from megalith.common.locks import LockedError, locked
from megalith.training.pretrain import train
from tests.tiny import losses, tiny_config

SHORT = {"train_iters": 2, "lr_warmup_iters": 1, "eval_iters": 0}


def everything(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory) -> pathlib.Path:
    """A run of two steps that tests do not change."""
    folder = tmp_path_factory.mktemp("done") / "run"
    train(tiny_config(corpus, str(folder), **SHORT))
    return folder


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_second_run_names_the_first_and_touches_nothing(done, corpus, place, fresh):
    before = everything(done.parent)
    with (
        locked(done / place, inside=True),
        pytest.raises(LockedError, match=r"run.* is being written by process \d+ on .*--run-dir or --save"),
    ):
        train(tiny_config(corpus, str(done), fresh=fresh, **SHORT | {"train_iters": 4}))
    assert everything(done.parent) == before and not list(done.parent.rglob(".lock"))


def test_fresh_moves_no_run_that_lies_within(done, corpus):
    with locked(done / "inner", inside=True), pytest.raises(LockedError, match="inner is being written"):
        train(tiny_config(corpus, str(done), fresh=True, **SHORT))


def test_one_folder_of_checkpoints_under_two_names(tmp_path, done, corpus):
    """Two run folders with one --save, the second by way of a symbolic link; what was made for nothing is gone again."""
    (tmp_path / "link").symlink_to(done)
    with locked(done / "checkpoints", inside=True), pytest.raises(LockedError, match="checkpoints is being written"):
        train(tiny_config(corpus, str(tmp_path / "other"), save=str(tmp_path / "link" / "checkpoints"), **SHORT))
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_killed_run_is_taken_over(tmp_path, corpus, capsys):
    run = tmp_path / "run"
    with locked(run, inside=True):
        holder = json.loads((run / ".lock").read_text())
    run.mkdir()
    (run / ".lock").write_text(json.dumps(holder | {"started": "1"}))
    assert train(tiny_config(corpus, str(run), **SHORT)).iteration == 2
    assert "the lock of process" in capsys.readouterr().out and not list(run.rglob(".lock"))


def test_a_checkpoint_of_another_run_is_not_replaced_nor_deleted(tmp_path, corpus):
    mine, other = tmp_path / "mine", tmp_path / "other"
    train(tiny_config(corpus, str(mine), save_interval=1, **SHORT))
    train(tiny_config(corpus, str(other), save_interval=1, **SHORT | {"train_iters": 4}))
    for number in ("iter_0000003", "iter_0000004"):
        (other / "checkpoints" / number).rename(mine / "checkpoints" / number)
    before = everything(mine / "checkpoints" / "iter_0000004")
    longer = tiny_config(corpus, str(mine), save_interval=1, keep_last=1, **SHORT | {"train_iters": 4}, override_opt_param_scheduler=True)
    with pytest.raises(CheckpointError, match=r"iter_0000003, iter_0000004 of another run.*resumed after step 2.*--save"):
        train(longer)
    assert len(losses(str(mine))) == 2
    (mine / "checkpoints" / "iter_0000003").rename(mine / "checkpoints" / "iter_0000000")
    with pytest.raises(CheckpointError, match="iter_0000004"):
        train(longer)
    with pytest.raises(CheckpointError, match="was written by another run"):
        state = {"run": "a third one"}
        checkpoint.save(mine / "checkpoints", 4, {}, train_state=state, config_yaml="")
    assert everything(mine / "checkpoints" / "iter_0000004") == before
    (mine / "checkpoints" / "iter_0000004").rename(tmp_path / "away")
    assert train(longer).iteration == 4
    assert checkpoint.iterations(mine / "checkpoints") == [0, 4], "its own older ones are pruned, the other run's is not"


def test_what_a_killed_run_left_is_removed(tmp_path, corpus):
    left = [tmp_path / "run" / ".metrics.jsonl.7.0123abcd.tmp", tmp_path / "run" / "checkpoints" / ".latest.7.0123abcd.tmp"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    train(tiny_config(corpus, str(tmp_path / "run"), **SHORT))
    assert not any(path.exists() for path in left)
