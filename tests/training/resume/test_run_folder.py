"""One run at a time writes a folder, and replaces nothing that another one wrote."""

import contextlib
import json
import pathlib
import shutil

import pytest

from megalith import checkpoint
from megalith.common.errors import CheckpointError, ConfigError, TrainingError
from megalith.common.locks import LockedError, locked
from megalith.training.pretrain import train
from megalith.training.resume import run_folder
from tests.tiny import losses, tiny_config

SHORT = {"train_iters": 2, "lr_warmup_iters": 1, "eval_iters": 0}


def file_contents(folder: pathlib.Path) -> dict[str, bytes]:
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
    before = file_contents(done.parent)
    with (
        locked(done / place, inside=True),
        pytest.raises(LockedError, match=r"run.* is being written by process \d+ on .*--run-dir or --save"),
    ):
        train(tiny_config(corpus, str(done), fresh=fresh, **SHORT | {"train_iters": 4}))
    assert file_contents(done.parent) == before and not list(done.parent.rglob(".lock"))


def test_a_run_that_lost_its_folder_saves_nothing_there(tmp_path, corpus, monkeypatch):
    """To another machine's, while it was suspended."""

    hold_folders = run_folder.hold_folders

    @contextlib.contextmanager
    def lost(config):
        def still_held():
            (tmp_path / "run/.lock").write_text('{"nonce": "of another"}')
            held()

        with hold_folders(config) as held:
            yield still_held

    monkeypatch.setattr(run_folder, "hold_folders", lost)
    with pytest.raises(CheckpointError, match=r"^.*run: this process was suspended, .* lost its lock"):
        train(tiny_config(corpus, str(tmp_path / "run"), **SHORT))
    assert not checkpoint.iterations(tmp_path / "run")


def test_fresh_moves_no_run_that_lies_within(done, corpus):
    with locked(done / "inner", inside=True), pytest.raises(LockedError, match="inner is being written"):
        train(tiny_config(corpus, str(done), fresh=True, **SHORT))


def test_one_folder_of_checkpoints_under_two_names(tmp_path, done, corpus):
    """Two run folders with one --save, the second through a symbolic link; unused folders are removed again."""
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
    before = file_contents(mine / "checkpoints" / "iter_0000004")
    longer = tiny_config(
        corpus, str(mine), save_interval=1, keep_last=1, **SHORT | {"train_iters": 4}, override_opt_param_scheduler=True
    )
    with pytest.raises(
        CheckpointError, match=r"iter_0000003, iter_0000004 of another run.*resumed after step 2.*--save"
    ):
        train(longer)
    assert len(losses(str(mine))) == 2
    (mine / "checkpoints" / "iter_0000003").rename(mine / "checkpoints" / "iter_0000000")
    with pytest.raises(CheckpointError, match="iter_0000004"):
        train(longer)
    with pytest.raises(CheckpointError, match="was written by another run"):
        state = {"run": "a third one"}
        checkpoint.save(mine / "checkpoints", 4, {}, train_state=state, config_yaml="")
    assert file_contents(mine / "checkpoints" / "iter_0000004") == before
    (mine / "checkpoints" / "iter_0000004").rename(tmp_path / "away")
    assert train(longer).iteration == 4
    # Its own older ones are pruned, the other run's is not; 3 stays, as nothing has measured 4.
    assert checkpoint.iterations(mine / "checkpoints") == [0, 3, 4]


def test_what_a_killed_run_left_is_removed(tmp_path, corpus):
    left = [
        tmp_path / "run" / ".metrics.jsonl.7.0123abcd.tmp",
        tmp_path / "run" / "checkpoints" / ".latest.7.0123abcd.tmp",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    train(tiny_config(corpus, str(tmp_path / "run"), **SHORT))
    assert not any(path.exists() for path in left)


def without_run_dir(corpus, **changes):
    """A config whose run folder is not named."""
    return tiny_config(corpus, "", **SHORT).replace(**{"run_dir": None} | changes)


def test_the_record_lies_with_the_checkpoints_of_save(tmp_path, corpus, monkeypatch, capsys):
    """Two runs with only --save once shared runs/gpt, where the second one overwrote the record of the first."""
    monkeypatch.chdir(tmp_path)
    train(without_run_dir(corpus, save="a"))
    before = file_contents(tmp_path / "a")
    train(without_run_dir(corpus, save="b", load="a", finetune=True, seed=7))
    train(without_run_dir(corpus, save="c", train_iters=3))
    assert file_contents(tmp_path / "a") == before and not (tmp_path / "runs").exists()
    assert [len(losses(name)) for name in "abc"] == [2, 2, 3]
    out = capsys.readouterr().out
    assert (
        "run folder b\n" in out
        and "checkpoint b/iter_0000002, picture b/loss.png, numbers of every step b/metrics.jsonl" in out
    )
    assert "numbers of every step r/metrics.jsonl" not in out
    train(without_run_dir(corpus))
    train(without_run_dir(corpus, save="a/checkpoints", run_dir="r"))
    assert len(losses("runs/gpt")) == len(losses("r")) == 2 and file_contents(tmp_path / "a").items() >= before.items()


def test_a_run_that_began_in_runs_gpt_resumes_there(tmp_path, corpus, monkeypatch, capsys):
    """Before, the run folder did not follow --save."""
    monkeypatch.chdir(tmp_path)
    constant = {"lr_decay_style": "constant", "lr_warmup_iters": 0, "override_opt_param_scheduler": True}
    old = without_run_dir(corpus, save="a", **constant)
    train(old.replace(run_dir="runs/gpt"))
    config = tmp_path / "runs/gpt/config.yaml"
    config.write_text(config.read_text().replace("run_dir: runs/gpt", "run_dir: null"))
    train(old.replace(train_iters=4))
    assert "run folder runs/gpt, where this run began its record" in capsys.readouterr().out
    assert len(losses("runs/gpt")) == 4 and not (tmp_path / "a" / "metrics.jsonl").exists()
    train(without_run_dir(corpus, save="b", **constant))
    assert len(losses("b")) == 2 and len(losses("runs/gpt")) == 4


def test_a_record_of_another_run_is_not_written_over(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(without_run_dir(corpus, run_dir="r", save="a"))
    train(without_run_dir(corpus, save="b", train_iters=3))
    before = file_contents(tmp_path)
    for other in (
        {"save": "c"},
        {"save": "c", "load": "a", "finetune": True},
        {"save": "b"},
        {"save": "b", "skip_train": True},
        {},
    ):
        with pytest.raises(
            ConfigError,
            match=r"r holds the record .* of a run whose checkpoints go to .*/a, and those of this one go to ",
        ):
            train(without_run_dir(corpus, run_dir="r", **other))
    for load in ({}, {"load": "b", "finetune": True}):
        with pytest.raises(
            ConfigError, match=r"b holds the record .* of a run, and b no checkpoint of it to resume from"
        ):
            (tmp_path / "b" / "iter_0000003").rename(tmp_path / "away")
            try:
                train(without_run_dir(corpus, save="b", **load | {"load": "a"} if load else load))
            finally:
                (tmp_path / "away").rename(tmp_path / "b" / "iter_0000003")
    assert file_contents(tmp_path) == before


def test_a_moved_run_resumes_where_it_is(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    longer = {"train_iters": 3, "override_opt_param_scheduler": True}
    train(without_run_dir(corpus, save="a"))
    (tmp_path / "a").rename(tmp_path / "b")
    train(without_run_dir(corpus, save="b", **longer))
    train(without_run_dir(corpus, run_dir="c"))
    (tmp_path / "c").rename(tmp_path / "d")
    train(without_run_dir(corpus, run_dir="d", **longer))
    shutil.copytree(tmp_path / "d", tmp_path / "e")
    train(without_run_dir(corpus, run_dir="e", save="e/checkpoints", **longer | {"train_iters": 4}))
    assert [len(losses(name)) for name in "bde"] == [3, 3, 4]


def test_an_attempt_that_saved_nothing_is_kept_aside(tmp_path, corpus, monkeypatch, capsys):
    """With --load the same command begins again; what it had written was replaced."""
    monkeypatch.chdir(tmp_path)
    train(without_run_dir(corpus, save="a"))
    again = without_run_dir(corpus, save="b", load="a", finetune=True)
    with pytest.raises(TrainingError, match="no checkpoint was written; the same command begins from the start"):
        train(again.replace(lr=1e30, train_iters=9, save_interval=1, lr_warmup_iters=0))
    written = (tmp_path / "b/metrics.jsonl").read_bytes()
    train(again)
    (aside,) = (tmp_path / "b").glob("metrics.before-*.jsonl")
    assert aside.read_bytes() == written and len(losses("b")) == 2
    assert f"what it had written in b is {aside.name} and loss.before" in capsys.readouterr().out
