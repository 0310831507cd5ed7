"""Each sentence that says what the next start does, or what to give it, is done as it says."""

import errno
import pathlib
import re

import pytest

from megalith import checkpoint
from megalith.common.errors import CheckpointError, ConfigError, RankError, TrainingError
from megalith.config.run import RunConfig
from megalith.training.failures import explain_errors
from megalith.training.pretrain import train
from megalith.training.reporting.metrics import Metrics
from megalith.training.resume.next_start import describe_next_start
from megalith.training.resume.saving import checkpoint_folder
from megalith.training.resume.state import Progress
from tests.tiny import losses, tiny_config

BASE = {"eval_iters": 0, "lr_decay_style": "constant", "lr_warmup_iters": 0}


@pytest.fixture(scope="module")
def other(corpus, tmp_path_factory) -> pathlib.Path:
    """The checkpoints 3, 6, 9 and 12 of another run."""
    folder = tmp_path_factory.mktemp("other")
    train(tiny_config(corpus, str(folder), save_interval=3, keep_last=0, **BASE))
    return folder / "checkpoints"


def flags_in(words: str) -> dict:
    """What flags set: {"load": "folder", "fresh": True}."""
    found = re.findall(r"--([a-z-]+)(?: ([^- ]\S*?)\.?(?=\s|$))?", words)
    return {name.replace("-", "_"): value or True for name, value in found}


def follow_sentence(config: RunConfig, sentence: str) -> RunConfig:
    """The config of the command in "the same command without --a and --b with --c x resumes from step 6"."""
    match = re.search(r"[Tt]he same command(?: without (--.*?))?(?: with (--.*?))? (?:resumes|begins|starts)", sentence)
    assert match, sentence
    dropped = {
        name: getattr(config.checkpoint.__class__(), name) for name in flags_in((match[1] or "").replace(" and", ""))
    }
    return config.replace(**dropped, **flags_in((match[2] or "").replace(" and", "")))


CASES = {
    "plain": {},
    "another folder": {"save": "elsewhere"},
    "load": {"load": "OTHER"},
    "load, finetune": {"load": "OTHER", "finetune": True},
    "load, step": {"load": "OTHER", "ckpt_step": 6},
    "load, step, finetune": {"load": "OTHER", "ckpt_step": 6, "finetune": True},
    "load, no optimizer": {"load": "OTHER", "no_load_optim": True},
    "load, no optimizer, none saved": {"load": "OTHER", "no_load_optim": True, "no_save_optim": True},
    "load, arguments": {"load": "OTHER", "use_checkpoint_args": True},
    "load, arguments, step": {"load": "OTHER", "use_checkpoint_args": True, "ckpt_step": 9},
    "fresh": {"fresh": True},
    "fresh, load": {"fresh": True, "load": "OTHER"},
    "none saved": {"no_save_optim": True},
    "schedule": {"override_opt_param_scheduler": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_resumes_as_it_says(case, other, corpus, tmp_path, capsys):
    changes = {name: str(other) if value == "OTHER" else value for name, value in CASES[case].items()}
    changes |= {"save": str(tmp_path / "elsewhere")} if "save" in changes else {}
    config = tiny_config(
        corpus, str(tmp_path / "run"), exit_interval=4, train_iters=18, override_opt_param_scheduler=True, **BASE
    )
    config = config.replace(**changes)
    stopped = train(config)
    said = capsys.readouterr().out
    assert f"stopped after step {stopped.iteration} (" in said and "resumes from there\n" in said, said
    record = losses(str(tmp_path / "run"))
    following = follow_sentence(config, said)
    after = train(following.replace(exit_interval=None))
    assert f"resuming after step {stopped.iteration} of 18" in capsys.readouterr().out
    assert after.iteration == 18 and losses(str(tmp_path / "run"))[: len(record)] == record


@pytest.mark.parametrize("step", [6, 9])
def test_a_run_that_went_back_resumes_from_where_it_came(step, corpus, tmp_path, capsys):
    """The case of the issue: --ckpt-step 6 in the run's own folder went back to 6 each time."""
    config = tiny_config(corpus, str(tmp_path / "run"), save_interval=3, keep_last=0, **BASE)
    train(config)
    back = config.replace(ckpt_step=step, exit_interval=4)
    assert train(back).iteration == 8 if step == 6 else 12
    said = capsys.readouterr().out
    if step == 6:
        assert "; the same command without --ckpt-step resumes from there" in said
    assert train(follow_sentence(back, said) if step == 6 else config).iteration == 12


def test_before_anything_is_saved(corpus, other, tmp_path):
    """What an error then says of the next start."""
    new = tiny_config(corpus, str(tmp_path / "run"), train_iters=4, lr=1e30, save_interval=1, **BASE)
    with pytest.raises(
        TrainingError, match="no checkpoint was written; the same command with --fresh begins from the start"
    ) as caught:
        train(new)
    with pytest.raises(ConfigError, match="--fresh"):
        train(new)
    assert train(follow_sentence(new, str(caught.value)).replace(lr=1e-3)).iteration == 4
    loading = tiny_config(
        corpus, str(tmp_path / "loading"), load=str(other), ckpt_step=6, override_opt_param_scheduler=True, **BASE
    )
    with pytest.raises(TrainingError, match="the same command starts from step 6 again") as caught:
        train(loading.replace(lr=1e30))
    assert train(follow_sentence(loading, str(caught.value))).iteration == 12
    fresh = new.replace(fresh=True)
    with pytest.raises(TrainingError, match="; the same command begins from the start"):
        train(fresh)
    assert train(fresh.replace(lr=1e-3)).iteration == 4


def test_a_full_disk_says_how_to_go_on(corpus, tmp_path, monkeypatch):
    class Full(Metrics):
        def on_step(self, run, record):
            super().on_step(run, record)
            if record.step == full_at:
                raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr("megalith.training.reporting.reporters.Metrics", Full)
    config = tiny_config(corpus, str(tmp_path / "run"), save_interval=3, **BASE)
    full_at = 2
    with pytest.raises(
        TrainingError, match=r"No space left.*Free space; no checkpoint was written; .* --fresh begins"
    ) as caught:
        train(config)
    full_at = 5
    again = follow_sentence(config, str(caught.value))
    with pytest.raises(
        TrainingError, match=r"No space left.*Free space; the same command without --fresh resumes from step 3"
    ) as caught:
        train(again)
    full_at = 0
    assert train(follow_sentence(config, str(caught.value))).iteration == 12


def test_validating_alone_begins_again(other, corpus, tmp_path, capsys):
    config = tiny_config(corpus, str(tmp_path / "run"), load=str(other), skip_train=True, exit_duration_in_mins=0.0)
    train(config)
    assert "(--exit-duration-in-mins is over); the same command measures from the beginning" in capsys.readouterr().out
    train(config.replace(exit_duration_in_mins=None))
    assert "validation loss at the end of training" in capsys.readouterr().out
    train(config.replace(lr=None, train_iters=None, exit_duration_in_mins=None))
    for length in ({"train_iters": 0}, {"train_iters": None, "train_samples": 5, "lr_warmup_iters": 0}):
        with pytest.raises(
            ConfigError,
            match=rf"found {length.get('train_samples', 0)}\. .* --skip-train to validate and test what --load",
        ):
            train(config.replace(run_dir=str(tmp_path / "none"), skip_train=False, **length))
        train(config.replace(run_dir=str(tmp_path / "none"), exit_duration_in_mins=None, **length))
        assert "validation loss at the end of training" in capsys.readouterr().out


def lost(config) -> None:
    """On each rank of a pool: contact is lost, says the error of a collective."""
    progress = Progress(iteration=7)
    with explain_errors(progress, lambda: describe_next_start(config, progress)):
        raise RuntimeError("Application timeout caused pair closure")


def test_ranks_that_lost_another_say_the_same(ranks, corpus, tmp_path):
    config = tiny_config(corpus, str(tmp_path / "run"), exit_interval=5, **BASE)
    with pytest.raises(
        RankError, match=r"name it\. No checkpoint was written; the same command begins from the start\. "
    ):
        ranks(lost, 2, config)
    train(config)
    with pytest.raises(RankError, match=r"name it\. The same command resumes from step 5\. "):
        ranks(lost, 2, config)


def test_a_finished_run_resumes_with_the_flags_that_it_names(corpus, tmp_path, capsys):
    for style in ("cosine", "constant"):
        config = tiny_config(corpus, str(tmp_path / style), eval_iters=0, lr_decay_style=style)
        train(config)
        train(config)
        assert "(raise --train-iters, with --override-opt-param-scheduler, to train longer)" in capsys.readouterr().out
        assert train(config.replace(train_iters=14, override_opt_param_scheduler=True)).iteration == 14


def test_the_choices_for_another_schedule_work(corpus, tmp_path):
    config = tiny_config(corpus, str(tmp_path / "run"), eval_iters=0, exit_interval=4)
    train(config)
    changed = config.replace(lr=1e-4, exit_interval=None)
    with pytest.raises(
        ConfigError, match=r"--override-opt-param-scheduler .*, or --use-checkpoint-opt-param-scheduler"
    ):
        train(changed)
    assert train(changed.replace(use_checkpoint_opt_param_scheduler=True, exit_interval=8)).iteration == 8
    assert train(changed.replace(override_opt_param_scheduler=True)).iteration == 12


def test_the_offer_of_an_older_checkpoint_works(corpus, tmp_path):
    config = tiny_config(corpus, str(tmp_path / "run"), save_interval=3, keep_last=0, exit_interval=9, **BASE)
    train(config)
    own = checkpoint_folder(config)
    next((own / "iter_0000009").glob("*.distcp")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="of iteration 6: load it with --ckpt-step 6") as caught:
        train(config)
    assert (
        train(config.replace(**{name: int(value) for name, value in flags_in(str(caught.value)).items()})).iteration
        == 9
    )
    assert not checkpoint.verify(own / "iter_0000009") and train(config).iteration == 12


def test_the_choices_for_weights_without_optimizer_work(corpus, tmp_path):
    config = tiny_config(corpus, str(tmp_path / "run"), exit_interval=4, no_save_optim=True, **BASE)
    train(config)
    with pytest.raises(CheckpointError, match=r"--no-load-optim to resume.*--finetune --run-dir NEW") as caught:
        train(config)
    assert train(config.replace(no_load_optim=True)).iteration == 8
    load = re.search(r"--load (\S+) --finetune", str(caught.value))[1]
    assert train(config.replace(run_dir=str(tmp_path / "new"), load=load, finetune=True)).iteration == 4


def test_the_choices_for_two_sources_work(other, corpus, tmp_path):
    config = tiny_config(
        corpus, str(tmp_path / "run"), exit_interval=4, override_opt_param_scheduler=True, train_iters=24, **BASE
    )
    train(config)
    both = config.replace(load=str(other))
    with pytest.raises(
        ConfigError, match="Drop --load to resume this run, name another --run-dir or --save, or give --fresh"
    ):
        train(both)
    assert train(both.replace(load=None)).iteration == 8
    assert train(both.replace(run_dir=str(tmp_path / "second"))).iteration == 16
    assert train(both.replace(run_dir=str(tmp_path / "third"), save=str(tmp_path / "apart"))).iteration == 16
    assert train(both.replace(fresh=True)).iteration == 16 and len(list(tmp_path.glob("run.before-*"))) == 1


LOADED = [  # flags, what the line says was loaded, and what was not
    (
        {"finetune": True},
        "the weights; not the optimizer's state, the schedule and the counts of steps and samples: --finetune begins",
    ),
    (
        {"no_load_optim": True},
        "the weights and the counts of steps and samples; not the optimizer's state and the schedule: --no-load-",
    ),
    (
        {"skip_train": True},
        "the weights and the counts of steps and samples; not the optimizer's state and the schedule: --skip-train",
    ),
    ({}, "the weights, the optimizer's state, the schedule and the counts of steps and samples\n"),
]


@pytest.mark.parametrize(("flags", "said"), LOADED)
def test_a_start_says_what_it_loaded_and_what_not(flags, said, other, corpus, tmp_path, capsys):
    changes = {"load": str(other), "train_iters": 13, "override_opt_param_scheduler": True, "exit_interval": 1}
    config = tiny_config(corpus, str(tmp_path / "run"), **BASE | changes | flags)
    train(config.replace(eval_iters=1) if flags.get("skip_train") else config)
    out = capsys.readouterr().out
    assert f"loaded from {other}/iter_0000012: {said}" in out and out.count("loaded from") == 1


def test_a_start_from_random_weights_loads_nothing(corpus, tmp_path, capsys):
    train(tiny_config(corpus, str(tmp_path / "random"), exit_interval=1, **BASE))
    assert "loaded from" not in capsys.readouterr().out
