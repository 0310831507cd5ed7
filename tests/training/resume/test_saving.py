"""What a run folder that is not empty means."""

import pathlib

import pytest
import torch

from megalith import checkpoint
from megalith.checkpoint import formats
from megalith.checkpoint.formats import FORMATS, MegatronOptions
from megalith.common.errors import CheckpointError, ConfigError
from megalith.training.pretrain import train
from megalith.workflows.conversion import convert
from tests.tiny import losses, tiny_config


@pytest.fixture
def run(corpus, tmp_path) -> pathlib.Path:
    """A finished run of 12 steps with checkpoints at 6 and 12."""
    folder = tmp_path / "run"
    train(tiny_config(corpus, str(folder), save_interval=6))
    return folder


def test_the_same_command_resumes_and_finds_nothing_to_do(run, corpus):
    record = (run / "metrics.jsonl").read_bytes()
    assert train(tiny_config(corpus, str(run), save_interval=6)).iteration == 12
    kept = [line for line in (run / "metrics.jsonl").read_bytes().splitlines() if b'"loss"' in line]
    assert kept == [line for line in record.splitlines() if b'"loss"' in line]


def test_the_last_line_names_what_was_written(corpus, tmp_path, capsys):
    folder = tmp_path / "run"
    train(tiny_config(corpus, str(folder), train_iters=3, eval_iters=0))
    done, last = capsys.readouterr().out.splitlines()[-2:]
    assert done == "all 3 steps are done"
    names = [word.rstrip(",") for word in last.split() if "/" in word]
    assert [pathlib.Path(name).name for name in names] == ["iter_0000003", "loss.png", "metrics.jsonl"]
    assert all(pathlib.Path(name).exists() for name in names)


def test_a_run_that_only_measures_says_so(run, corpus, tmp_path, capsys):
    train(tiny_config(corpus, str(tmp_path / "other"), load=str(run), skip_train=True))
    said = capsys.readouterr().out
    assert "measuring step 12\n" in said and "step 12 is measured\n" in said and "loss.png" not in said
    train(tiny_config(corpus, str(tmp_path / "none"), exit_duration_in_mins=0.0))
    assert "loss.png" not in capsys.readouterr().out


def test_longer(run, corpus):
    assert train(tiny_config(corpus, str(run), train_iters=14, override_opt_param_scheduler=True)).iteration == 14
    assert len(losses(str(run))) == 14


def test_what_changed_is_reported(run, corpus, tmp_path, capsys):
    longer = {"train_iters": 13, "override_opt_param_scheduler": True}
    train(tiny_config(corpus, str(run), **longer, num_workers=0))
    assert "changed since" not in capsys.readouterr().out
    train(tiny_config(corpus, str(run), **longer | {"train_iters": 15}, seed=7, clip_grad=0.5, exit_interval=14))
    said = capsys.readouterr().out
    assert "--seed is 7, was 1234" in said and "--clip-grad is 0.5, was 1" in said and said.count("changed since") == 2
    assert "; the same command resumes" in said
    train(tiny_config(corpus, str(tmp_path / "other"), load=str(run), **longer | {"train_iters": 16}, exit_interval=15))
    assert "the same command without --load resumes" in capsys.readouterr().out


def test_a_run_from_before_the_fused_gelu_keeps_its_own(corpus, tmp_path, capsys, monkeypatch):
    """It trained with the exact GELU, and resumes with it by a command that now means the tanh approximation."""
    exact, old = (tiny_config(corpus, str(tmp_path / name), bias_gelu_fusion=False) for name in ("exact", "old"))
    train(exact)
    train(old.replace(exit_interval=6))
    read = checkpoint.read_config
    monkeypatch.setattr(checkpoint, "read_config", lambda path: read(path).replace("  bias_gelu_fusion: false\n", ""))
    capsys.readouterr()
    train(old.replace(bias_gelu_fusion=True))
    said = capsys.readouterr().out
    assert "--no-bias-gelu-fusion says the same" in said and "; activation gelu;" in said
    assert losses(str(tmp_path / "old")) == losses(str(tmp_path / "exact"))


def test_another_schedule_is_named(run, corpus):
    with pytest.raises(ConfigError, match="--override-opt-param-scheduler"):
        train(tiny_config(corpus, str(run), train_iters=14))


def test_fresh_moves_the_run_aside(run, corpus):
    old = (run / "metrics.jsonl").read_bytes()
    train(tiny_config(corpus, str(run), fresh=True, train_iters=2, lr_warmup_iters=1))
    assert len(losses(str(run))) == 2
    aside = list(run.parent.glob("run.before-*"))
    assert len(aside) == 1 and (aside[0] / "metrics.jsonl").read_bytes() == old


def test_a_record_without_a_checkpoint_is_not_overwritten(tmp_path, corpus):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(ConfigError, match="--fresh"):
        train(tiny_config(corpus, str(tmp_path / "run")))


def test_load_of_nothing_is_an_error(tmp_path, corpus):
    with pytest.raises(CheckpointError, match="--load must be an existing file or folder with a complete checkpoint"):
        train(tiny_config(corpus, str(tmp_path / "run"), load=str(tmp_path / "nowhere")))


def test_load_of_an_incomplete_checkpoint_of_another_program(tmp_path, corpus):
    """Verbs that read our own folders alone name the import."""
    (tmp_path / "theirs/iter_0000005/mp_rank_00").mkdir(parents=True)
    (tmp_path / "theirs/latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(
        CheckpointError,
        match=r"theirs holds no complete checkpoint \(iter_NNNNNNN/\), nor weights in another known format",
    ):
        train(tiny_config(corpus, str(tmp_path / "run"), load=str(tmp_path / "theirs")))
    (tmp_path / "deepspeed/global_step5").mkdir(parents=True)
    (tmp_path / "deepspeed/latest").write_text("global_step5")
    for name in ("theirs", "deepspeed"):
        with pytest.raises(CheckpointError, match="megalith checkpoint import"):
            checkpoint.find(tmp_path / name)


def test_no_load_optim_resumes_with_new_moments(run, tmp_path, corpus):
    """The iteration and the samples go on, the optimizer and the schedule begin anew."""
    config = tiny_config(
        corpus,
        str(tmp_path / "on"),
        load=str(run / "checkpoints"),
        no_load_optim=True,
        no_load_rng=True,
        train_iters=14,
    )
    assert train(config).iteration == 14 and len(losses(str(tmp_path / "on"))) == 2


def test_a_run_resumes_from_its_export_to_megatron_bit_for_bit(run, tmp_path, corpus):
    """Weights, moments, steps, schedule and samples survive the way through Megatron's files of another layout."""
    six = run / "checkpoints/iter_0000006"
    options = MegatronOptions(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        with_optimizer=True,
        use_distributed_optimizer=True,
    )
    FORMATS.find("megatron").write(formats.read(six), tmp_path / "megatron", options)
    convert(tmp_path / "megatron", tmp_path / "back", to="megalith", options=dict(with_optimizer=True))
    train(tiny_config(corpus, str(tmp_path / "on"), load=str(tmp_path / "back")))
    assert losses(str(tmp_path / "on")) == losses(str(run))[6:]
    tuned = tiny_config(
        corpus, str(tmp_path / "tuned"), load=str(tmp_path / "back"), finetune=True, train_iters=2, lr_warmup_iters=1
    )
    assert train(tuned).iteration == 2


def test_two_sources_are_an_error(run, tmp_path, corpus):
    other = tmp_path / "other"
    train(tiny_config(corpus, str(other), train_iters=2, lr_warmup_iters=1))
    with pytest.raises(ConfigError, match="only one"):
        train(tiny_config(corpus, str(run), load=str(other / "checkpoints")))


def test_finetune_takes_weights_alone_and_resumes_itself(run, tmp_path, corpus):
    tuned = tmp_path / "tuned"
    config = tiny_config(
        corpus,
        str(tuned),
        load=str(run / "checkpoints"),
        finetune=True,
        train_iters=4,
        save_interval=2,
        exit_interval=2,
    )
    assert train(config).iteration == 2
    assert losses(str(tuned))[0] < 3.5, "the first loss is that of trained weights"
    assert train(config).iteration == 4, "the same command resumes its own checkpoint"


def test_a_damaged_checkpoint_is_named_with_the_newest_good_one(run, corpus):
    victim = next((run / "checkpoints" / "iter_0000012").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        train(tiny_config(corpus, str(run), train_iters=14, override_opt_param_scheduler=True))
    assert victim.name in str(caught.value) and "6" in str(caught.value)


def test_another_shape_is_named(run, corpus):
    with pytest.raises(CheckpointError, match="--hidden-size"):
        train(tiny_config(corpus, str(run), hidden_size=48))


def test_without_optimizer(run, tmp_path, corpus):
    config = tiny_config(corpus, str(tmp_path / "lean"), train_iters=2, lr_warmup_iters=1, no_save_optim=True)
    train(config)
    names = checkpoint.read_full(tmp_path / "lean" / "checkpoints" / "iter_0000002")
    assert names and all(name.startswith("model/") for name in names)
    assert all(isinstance(tensor, torch.Tensor) for tensor in names.values())
    with pytest.raises(CheckpointError, match="--no-load-optim"):
        train(
            tiny_config(
                corpus, str(tmp_path / "lean"), train_iters=4, lr_warmup_iters=1, override_opt_param_scheduler=True
            )
        )


@pytest.mark.slow
def test_a_run_resumes_from_before_its_first_update(tmp_path, corpus):
    """The first steps of float16 overflow and are skipped: a checkpoint then has no optimizer's state, nor needs it."""
    whole, parts = (str(tmp_path / name) for name in ("whole", "parts"))
    changes = {"fp16": True, "initial_loss_scale": 2.0**22, "hysteresis": 1, "save_interval": 1}
    train(tiny_config(corpus, whole, **changes))
    assert train(tiny_config(corpus, parts, exit_interval=1, **changes)).scheduled_samples == 0
    train(tiny_config(corpus, parts, **changes))
    assert losses(parts) == losses(whole)
