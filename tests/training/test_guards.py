"""A run that has diverged stops, says so, and neither saves nor deletes; one that has nothing to learn says so too."""

import math
import pathlib

import pytest
import torch

from megalith import checkpoint
from megalith.common.errors import CheckpointError, TrainingError
from megalith.training import finite
from megalith.training.callbacks import ValidationRecord
from megalith.training.duties import SaveCheckpoints
from megalith.training.guards import MAX_EMPTY_STEPS, PruneCheckpoints, StopDiverged, StopEmptyBatches
from megalith.training.pretrain import train
from megalith.training.resume.state import Progress
from megalith.training.tasks import LanguageModelling
from tests.tiny import losses, records, tiny_config
from tests.training.records import run_info, step

AGAIN = {"override_opt_param_scheduler": True, "lr_decay_style": "constant", "lr_warmup_iters": 0}


class Bad(LanguageModelling):
    """A loss that is not a number where the batch begins with sample 24 or a later one: from the fourth step on."""

    last = math.inf

    def losses(self, output, batch, counts):
        broken = 24 <= int(batch["samples"][0]) < self.last
        return {"lm loss": output.sum() * (math.nan if broken else 1.0)}


class BadAWhile(Bad):
    """The same in the fourth and fifth step alone."""

    last = 40


class Worse(LanguageModelling):
    """A loss that is never a number."""

    def losses(self, output, batch, counts):
        return {"lm loss": output.sum() * math.nan}


class Masked(LanguageModelling):
    """Nothing to learn anywhere."""

    def counts(self, batch):
        batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
        return super().counts(batch)


def task(name: str) -> str:
    return f"tests.training.test_guards:{name}"


def checkpoints(folder) -> list[int]:
    return checkpoint.iterations(pathlib.Path(folder) / "checkpoints")


FP16 = {"fp16": True, "initial_loss_scale": 4.0, "hysteresis": 1}


@pytest.mark.parametrize("precision", [{}, pytest.param({"bf16": True}, marks=pytest.mark.slow), FP16])
def test_a_diverged_run_stops_and_the_good_checkpoints_stay(corpus, tmp_path, precision):
    """A good iteration 7, then a learning rate of 1e20; weights that are huge but finite are found too."""
    run = str(tmp_path / "run")
    config = tiny_config(corpus, run, eval_iters=0, train_iters=7, **precision, **AGAIN)
    train(config)
    for lr in (1e20, 1e38):
        with pytest.raises(TrainingError, match=r"Step 8: .*diverged.* the same command resumes from step 7"):
            train(config.replace(train_iters=20, lr=lr, save_interval=2, keep_last=1))
        assert checkpoints(run) == [7] == [checkpoint.latest(tmp_path / "run" / "checkpoints")]
    assert train(config.replace(train_iters=9)).iteration == 9, "the cure works"


def test_float16_stops_ten_steps_after_no_scale_can_help(corpus, tmp_path):
    """Weights of 100 overflow float16 in the forward pass, whatever the scale; --keep-last 1 keeps the good ones."""
    run = str(tmp_path / "run")
    config = tiny_config(
        corpus, run, eval_iters=0, train_iters=7, fp16=True, initial_loss_scale=65536.0, hysteresis=1, **AGAIN
    )
    train(config)
    with pytest.raises(TrainingError, match=r"Step 18: .*10 steps in a row.*--ckpt-step goes further back"):
        train(config.replace(train_iters=60, lr=100.0, save_interval=1, keep_last=1))
    assert checkpoints(run) == [7, 8]
    assert train(config.replace(train_iters=9, ckpt_step=7)).iteration == 9, "the cure works"


@pytest.mark.slow
def test_a_run_that_stops_right_after_a_save_deletes_nothing_that_may_be_the_last_good(corpus, tmp_path):
    """The next start's first step does that, so that short jobs, which save only at their end, do not fill the disk."""
    run = str(tmp_path / "run")
    config = tiny_config(corpus, run, eval_iters=0, train_iters=20, keep_last=1, **AGAIN)
    for last, kept in ((3, [3]), (5, [3, 5]), (7, [5, 7])):
        train(config.replace(exit_interval=last))
        assert checkpoints(run) == kept
    train(config.replace(exit_interval=8, lr=1e10))
    assert checkpoints(run) == [7, 8]
    with pytest.raises(TrainingError, match=r"Step 9: .*found loss nan.*--ckpt-step goes further back"):
        train(config)
    train(config.replace(skip_train=True, eval_iters=1, ckpt_step=7))
    assert checkpoints(run) == [7, 8], "measuring deletes nothing"
    assert train(config.replace(train_iters=9, ckpt_step=7)).iteration == 9, "the cure works"
    assert checkpoints(run) == [7, 8, 9], "nothing has measured the last one"
    train(config.replace(train_iters=9, eval_iters=1))
    assert checkpoints(run) == [7, 8, 9], "nor does measuring alone delete"
    train(config.replace(train_iters=10, eval_iters=1))
    assert checkpoints(run) == [10]


def diverge(config):
    """On each rank of a pool."""
    train(config)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"data_parallel_sharding": "full"}),
    ],
)
def test_all_ranks_decide_alike(ranks, corpus, tmp_path, world, layout):
    run = str(tmp_path / "run")
    config = tiny_config(corpus, run, eval_iters=0, train_iters=4, **AGAIN, **layout)
    ranks(diverge, world, config)
    with pytest.raises(TrainingError, match=r"^Step 5: .*diverged(?!.*on rank)"):
        ranks(diverge, world, config.replace(train_iters=9, lr=1e20, save_interval=1, keep_last=1), timeout=60)
    with pytest.raises(TrainingError, match=r"^Step 4: .*found loss nan"):
        ranks(
            diverge, world, config.replace(run_dir=str(tmp_path / "nan"), train_iters=9, loss=task("Bad")), timeout=60
        )
    assert checkpoints(run) == [4] and checkpoints(tmp_path / "nan") == []


def test_the_number_of_steps_and_the_check_are_the_users(corpus, tmp_path, capsys):
    config = tiny_config(corpus, str(tmp_path / "run"), eval_iters=0, loss=task("Bad"), log_interval=1, save_interval=1)
    with pytest.raises(TrainingError, match=r"Step 6: .* 3 steps in a row"):
        train(config.replace(max_nonfinite_steps=3))
    assert checkpoints(tmp_path / "run") == [1, 2, 3] and losses(str(tmp_path / "run"))[3:] == [None, None, None]
    assert (
        train(config.replace(run_dir=str(tmp_path / "a"), loss=task("BadAWhile"), max_nonfinite_steps=3)).nan_iterations
        == 2
    )
    unchecked = config.replace(run_dir=str(tmp_path / "b"), check_for_nan_in_loss_and_grad=False, keep_last=1)
    assert train(unchecked).nan_iterations == 9
    assert checkpoints(tmp_path / "b") == [2, 3, 12], "none is deleted while no step is finite"


def test_what_is_not_finite_is_not_resumed_from(corpus, tmp_path):
    """As a release before this one could save it."""
    folder = tmp_path / "run" / "checkpoints"
    config = tiny_config(corpus, str(tmp_path / "run"), eval_iters=0, save_interval=6)
    train(config)
    state = checkpoint.read_full(folder / "iter_0000012")
    state["model/embedding.weight"][0, 0] = math.nan
    stored, text = checkpoint.read_train_state(folder / "iter_0000012"), checkpoint.read_config(folder / "iter_0000012")
    checkpoint.save(folder, 13, state, train_state=stored, config_yaml=text)
    longer = config.replace(train_iters=14, override_opt_param_scheduler=True)
    with pytest.raises(CheckpointError, match=r"found model/embedding.weight\. .*--ckpt-step 12"):
        train(longer)
    assert train(longer.replace(ckpt_step=12)).iteration == 14, "the cure works"


def test_every_kind_of_not_finite_is_found():
    good = {"model/a": torch.ones(3), "optimizer/exp_avg_sq/a": torch.full((2,), 1e30), "model/empty": torch.ones(0)}
    assert finite.not_finite(good) == []
    for value in (math.nan, math.inf, -math.inf, 1e20):
        assert finite.not_finite(good | {"model/b": torch.tensor([1.0, value, 2.0])}) == ["model/b"]
    assert finite.not_finite({"optimizer/exp_avg/a": torch.tensor([math.inf])}) == ["optimizer/exp_avg/a"]


def test_what_counts_as_in_a_row():
    guard, run = StopDiverged(lambda: "again"), run_info(config={"fp16": True, "max_nonfinite_steps": 2})
    for number, state in enumerate(("lasting", "fine", "lasting", "searching"), 1):
        guard.on_step(run, step(number, skipped=state != "fine", scale_cannot_help=state == "lasting"))
    with pytest.raises(TrainingError, match="again"):
        guard.on_step(run, step(5, skipped=True, scale_cannot_help=True))


def test_a_loss_scale_that_is_too_high_is_named(corpus, tmp_path):
    config = tiny_config(corpus, str(tmp_path / "run"), eval_iters=0, fp16=True, max_nonfinite_steps=2)
    for scale, cure in (
        ({"loss_scale": 2.0**40}, "Drop --loss-scale"),
        ({"min_loss_scale": 2.0**32}, "Lower --min-loss-scale"),
    ):
        with pytest.raises(TrainingError, match=rf"Step 2: .*found loss 3\..*{cure}"):
            train(config.replace(run_dir=str(tmp_path / cure), **scale))


def test_a_run_shorter_than_the_steps_that_end_one(corpus, tmp_path):
    """Float16 is given ten steps; a run of three, none of them finite, is not all done."""
    config = tiny_config(corpus, str(tmp_path / "run"), eval_iters=0, train_iters=3, fp16=True, loss=task("Worse"))
    with pytest.raises(TrainingError, match=r"Step 3: .*3 steps in a row have.*found loss nan, "):
        train(config)
    assert checkpoints(tmp_path / "run") == []
    guard, run = StopDiverged(lambda: ""), run_info(config={"fp16": True}, train_iters=12)
    for number in range(1, 13):  # the last nine of twelve
        guard.on_step(run, step(number, skipped=number > 3, scale_cannot_help=number > 3))


def test_old_checkpoints_go_when_the_new_one_is_known_to_be_good():
    done, progress, run = [], Progress(), run_info(config={"save_interval": 2})
    keep = PruneCheckpoints(lambda: done.append(progress.saved), progress)
    save = SaveCheckpoints(lambda: None, progress)
    for number in range(1, 6):
        progress.iteration = number
        progress.scheduled_samples += number != 3
        for callback in (keep, save):
            callback.on_step(run, step(number, skipped=number == 3))
        assert done == {4: [2], 5: [2, 4]}.get(number, [])
    progress.saved = 6
    keep.on_validation(run, ValidationRecord(step=6, consumed_samples=1, losses={"lm loss": math.nan}))
    keep.on_end(run)
    assert done == [2, 4], "where nothing measured it, the last one is not taken for good, and one more stays"
    keep.on_validation(run, ValidationRecord(step=6, consumed_samples=1, losses={"lm loss": 1.0}))
    assert done == [2, 4, 6]


def test_masked_data_is_reported_and_then_an_error(corpus, tmp_path, capsys):
    config = tiny_config(
        corpus, str(tmp_path / "run"), loss=task("Masked"), train_iters=MAX_EMPTY_STEPS + 2, eval_interval=5
    )
    with pytest.raises(
        TrainingError,
        match=f"Step {MAX_EMPTY_STEPS}, lm loss: no token of 8 samples counts, {MAX_EMPTY_STEPS} steps in a row",
    ):
        train(config)
    said = capsys.readouterr()
    assert said.err.count("no token of 8 samples counts (all are masked)") == 1 and "--eod-mask-loss" in said.err
    assert "no token of 16 samples counts for the lm loss" in said.err
    assert "PPL: NAN" in said.out and "PPL: 1.0" not in said.out
    assert {line.get("loss", line.get("validation_loss")) for line in records(str(tmp_path / "run"))} == {None}


def test_a_masked_batch_among_others_is_reported_again(capsys):
    guard, run = StopEmptyBatches(), run_info()
    for number in range(1, 4 * MAX_EMPTY_STEPS):
        guard.on_step(run, step(number, empty_losses=("lm loss",) if number % MAX_EMPTY_STEPS else ()))
    assert capsys.readouterr().err.count("no token") == 4
