"""Retro in training: runs, layouts, resuming, what is measured without neighbours, and a start from a GPT's weights."""

import pathlib

import pytest
import torch

from megalith import checkpoint
from megalith.common.errors import CheckpointError
from megalith.config.checks.retro import retro_problems
from megalith.testing import run_ranks
from megalith.training.pretrain import train
from megalith.workflows.conversion import convert
from tests.retro_workdir import drawn, tiny_retro, write_workdir
from tests.tiny import losses, records, tiny_config, write_corpus

LAYOUTS = {
    "tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus with the neighbours of its samples, and a run of 6 steps."""
    folder = tmp_path_factory.mktemp("retro")
    config = tiny_retro(write_corpus(str(folder / "tiny")), str(folder / "run"), train_iters=6, save_interval=3)
    config = config.replace(retro_workdir=write_workdir(str(folder / "workdir"), config, drawn))
    train(config)
    return config


def stored(folder: str | pathlib.Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a run's newest checkpoint."""
    tensors = checkpoint.read_full(checkpoint.find(pathlib.Path(folder)))
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model/")}


def stored_at(folder: pathlib.Path, step: int) -> dict[str, torch.Tensor]:
    """As `stored`, of a step."""
    tensors = checkpoint.read_full(checkpoint.find(folder, step))
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model/")}


def validation_loss(folder: str) -> float:
    return next(line["validation_loss"] for line in records(folder) if "validation_loss" in line)


def test_it_learns(made):
    found = losses(made.run_folder)
    assert len(found) == 6 and found[-1] < found[0] - 0.3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_has_the_losses_of_one_process(made, tmp_path, layout):
    ranks, changes = LAYOUTS[layout]
    run_ranks(train, ranks, made.replace(run_dir=str(tmp_path / "run"), **changes), timeout=600)
    assert losses(str(tmp_path / "run")) == pytest.approx(losses(made.run_folder), rel=2e-5)


def test_a_run_is_resumed(made, tmp_path):
    config = made.replace(run_dir=str(tmp_path / "run"))
    train(config.replace(exit_interval=3))
    train(config)
    assert losses(config.run_folder) == losses(made.run_folder)


def test_perplexity_without_neighbors_is_that_of_neighbors_that_are_missing(made, tmp_path):
    """--skip-train measures a model with neighbours, and with --retro-no-retrieval without."""
    measure = made.replace(load=made.run_folder, skip_train=True)
    none = write_workdir(str(tmp_path / "none"), made, lambda database, sample: drawn(database, sample) * 0 - 1)
    changes = {
        "with": {}, "without": {"retro_no_retrieval": True, "retro_workdir": None}, "none": {"retro_workdir": none},
    }  # fmt: skip
    for name, change in changes.items():
        train(measure.replace(run_dir=str(tmp_path / name), **change))
    found = {name: validation_loss(str(tmp_path / name)) for name in changes}
    assert found["without"] == found["none"] != pytest.approx(found["with"], rel=1e-4)


@pytest.mark.parametrize("format", ["megalith", "huggingface"])
def test_it_begins_with_the_weights_of_a_gpt(made, tmp_path, capsys, format):
    """Retro-fitting: the GPT's weights are kept, and what reads neighbours is drawn as it would be anyway."""
    source, run = tmp_path / "gpt", str(tmp_path / "run")
    train(tiny_config(made.data.data_path[0], str(source), train_iters=1, lr_warmup_iters=0, eval_iters=0))
    before, still = stored(source), {"lr": 1e-30, "train_iters": 1, "weight_decay": 0.0, "eval_iters": 0}
    if format != "megalith":
        convert(source, source := tmp_path / format, to=format)
    config = made.replace(run_dir=run, retro_workdir=None, retro_no_retrieval=True, lr_warmup_iters=0, **still)
    train(config.replace(load=str(source), finetune=True))
    assert "what reads neighbours (layers.*.cross_norm, layers.*.cross_attention, layers.*.encoder) is new" in (
        capsys.readouterr().out
    )
    found, new = stored(run), stored_fresh(config, tmp_path)
    assert before.keys() < found.keys() == new.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, before.get(name, new[name]), atol=1e-6), name
    if format == "megalith":  # whose run would be resumed; other programs' weights belong to no step
        with pytest.raises(CheckpointError, match="must be of a run of this task to resume it"):
            train(config.replace(run_dir=str(tmp_path / "other"), load=str(source)))


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(
            1,
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
            id="recompute",
            marks=pytest.mark.slow,
        ),
        pytest.param(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, id="tp2 sp"),
        pytest.param(2, {"use_distributed_optimizer": True}, id="dp2", marks=pytest.mark.slow),
    ],
)
def test_a_frozen_gpt_stays_as_it_is(made, tmp_path, ranks, changes):
    """Retro-fitting as in the paper: stopped, resumed, and equal in every layout; what reads neighbours is trained."""
    gpt = str(tmp_path / "gpt")
    train(tiny_config(made.data.data_path[0], gpt, train_iters=1, lr_warmup_iters=0, eval_iters=0))
    config = made.replace(
        load=gpt, pretrained_checkpoint=gpt, finetune=True, retro_freeze=True, weight_decay=0.1,
    )  # fmt: skip
    train(config.replace(run_dir=str(tmp_path / "one")))
    config = config.replace(run_dir=str(tmp_path / "other"), **changes)
    run_ranks(train, ranks, config.replace(exit_interval=3), timeout=600)
    run_ranks(train, ranks, config, timeout=600)
    assert losses(str(tmp_path / "other")) == pytest.approx(losses(str(tmp_path / "one")), rel=2e-5)
    before, after = stored(gpt), stored(tmp_path / "other")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    middle = stored_at(tmp_path / "other", 3)
    assert all((after[name] != middle[name]).any() for name in after.keys() - before.keys())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--retro-freeze needs weights to freeze"),
        ({"load": "gpt", "lora_rank": 2}, "--retro-freeze excludes --lora-rank"),
        ({"load": "gpt", "retro_no_retrieval": True}, "--retro-freeze excludes --retro-no-retrieval"),
        ({"load": "gpt", "pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size must be 1 with"),
    ],
)
def test_what_a_frozen_gpt_excludes(made, changes, message):
    found = [problem.text for problem in retro_problems(made.replace(retro_freeze=True, **changes))]
    assert any(message in text for text in found), found
    assert not list(retro_problems(made.replace(retro_freeze=True, load="gpt")))


def stored_fresh(config, tmp_path) -> dict[str, torch.Tensor]:
    """The weights of the same model that begins with nothing."""
    train(config.replace(run_dir=str(tmp_path / "fresh")))
    return stored(tmp_path / "fresh")
