"""Metrics are reported as losses are, in every layout, and no gradient knows of them."""

import functools

import pytest
import torch

from megalith.common.errors import ConfigError, TrainingError
from megalith.config.run import RunConfig
from megalith.parallel import mesh as meshes
from megalith.runtime.build import build_runtime
from megalith.testing import parity, run_ranks
from megalith.training.forward_backward import forward_backward
from megalith.training.pretrain import train
from megalith.training.tasks import LanguageModelling, PooledTask, Task, build_task
from tests.parity.cases import LAYOUTS, SMALL
from tests.tiny import records, tiny_config

REPORTING = "tests.training.accuracy:Reporting"
OF_COUNTS = "must return the names of `counts` (what is not to be minimised is for `metrics`)"


def measured(config, name):
    """Gradients, and the sums over all processes."""
    runtime = build_runtime(config.replace(loss=name), meshes.init_mesh(config.parallel), torch.float64)
    task = build_task(runtime.config, runtime.mesh)
    made = parity.micro_batches(parity.batch(config), config.batch.micro_batch_size, runtime.mesh)
    _, sums = forward_backward(runtime, task, [runtime.prepare_batch(each, task.sequences) for each in made], 0)
    return {name: parity.full_tensor(parameter.grad) for name, parameter in runtime.named_parameters()}, sums.tolist()


@functools.cache
def alone(name):
    return run_ranks(measured, 1, SMALL, name)[0]


def test_the_gradient_is_that_of_the_loss_alone():
    plain, with_metrics = alone("lm"), alone(REPORTING)
    assert plain[0].keys() == with_metrics[0].keys() and all(
        torch.equal(plain[0][name], with_metrics[0][name]) for name in plain[0]
    )
    assert plain[1] == with_metrics[1][:1] and len(with_metrics[1]) == 5


@pytest.mark.parametrize(
    "layout", ["tp2 sp", "dp2 full", "cp2", "pp2", pytest.param("zbv", marks=pytest.mark.slow), "tp2 pp2 dp2"]
)
def test_sums_and_counts_are_those_of_one_process(layout):
    ranks, changes = LAYOUTS[layout]
    more = {"num_layers": 4} if "pp" in layout or "zbv" in layout else {}
    loss, tenfold, halves, seen, tokens = run_ranks(measured, 1, SMALL.replace(**more), REPORTING)[0][1]
    assert tenfold == pytest.approx(10.0 * loss) and halves == 2.0 and tokens == 64.0 and 0 < seen < tokens
    halves *= 2 if "cp2" in layout else 1  # each process of a sequence has all samples
    for _, sums in run_ranks(measured, ranks, SMALL.replace(**changes, **more), REPORTING):
        assert sums == pytest.approx([loss, tenfold, halves, seen, tokens], rel=1e-12)


def test_a_run_reports_them_by_name(corpus, tmp_path, capsys):
    changes = {"train_iters": 4, "eval_interval": 4, "log_interval": 2, "tensorboard_dir": str(tmp_path / "board")}
    train(tiny_config(corpus, str(tmp_path / "run"), loss=REPORTING, **changes))
    lines = records(str(tmp_path / "run"))
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 4 and all(line["metrics"]["tenfold"] == pytest.approx(2.5 * line["loss"]) for line in steps)
    assert all(line["metrics"]["counted share"] == 1.0 and "losses" not in line for line in steps)
    for split in ("validation", "test"):
        message = [line[f"{split}_metrics"] for line in lines if f"{split}_loss" in line]
        assert message and all(each.keys() == {"tenfold", "counted share"} for each in message)
    said = capsys.readouterr().out
    mean = sum(line["metrics"]["tenfold"] for line in steps[:2]) / 2
    assert (
        f" tenfold: {mean:.6E} | counted share: 1.000000E+00 |" in said
        and "counted share value: 1.000000E+00 |" in said
    )
    assert "counted share PPL" not in said
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(
        str(tmp_path / "board")
    )
    board.Reload()
    assert {"tenfold", "counted share vs samples", "tenfold validation", "counted share test"} <= set(
        board.Tags()["scalars"]
    )
    assert "tenfold validation ppl" not in board.Tags()["scalars"]


@pytest.mark.parametrize(("name", "message"), [
    ("Confused", "Confused.metric_names must not name a loss, as the two could not be told apart; found lm loss."),
    ("Undeclared", "Undeclared.metrics must return the names of `metric_names`; found surprise. Return none"),
    ("Silent", f"Silent.losses {OF_COUNTS}; found no lm loss."),
    ("Changing", "Changing.counts must return the same names for every micro-batch; found other loss, no lm loss."),
    ("Minimised", f"Minimised.losses {OF_COUNTS}; found accuracy."),
])  # fmt: skip
def test_a_name_that_is_not_declared_is_reported(corpus, tmp_path, name, message):
    config = tiny_config(corpus, str(tmp_path / "run"), loss=f"tests.training.accuracy:{name}", eval_iters=0)
    with pytest.raises(TrainingError) as error:
        train(config)
    assert message in str(error.value)


class Setup(LanguageModelling):
    def setup(self, config, mesh, tokenizer):
        self.given = config, mesh, tokenizer


class Plain:
    """As tasks were before they had metrics: three methods and no base."""

    def counts(self, batch):
        return {"plain loss": batch["loss_mask"].sum()}

    def inputs(self, batch, counts):
        return {}

    def losses(self, output, batch, counts):
        return {}


class Unfinished(PooledTask):
    def counts(self, batch):
        return {}


def made_by_a_function():
    return LanguageModelling()


def named(kind) -> RunConfig:
    return RunConfig().replace(loss=f"{__name__}:{kind.__name__}")


def test_a_task_is_set_up_and_a_plain_class_gets_what_it_lacks():
    assert build_task(named(Setup), "mesh", "tokenizer").given == (named(Setup), "mesh", "tokenizer")
    task = build_task(named(Plain), "mesh")
    assert isinstance(task, Task) and isinstance(task, Plain)
    assert task.metrics(None, {}) == {} and task.tokens({"input_ids": torch.zeros(2, 3)}) == 6


@pytest.mark.parametrize(("kind", "message"), [
    (Unfinished, "must have the methods counts, inputs and losses, and pooled where it is a PooledTask; found a class "
                 "without inputs and losses and pooled."),
    (made_by_a_function, "must be a class; found a function"),
])  # fmt: skip
def test_what_is_no_task_is_reported_at_start(kind, message):
    with pytest.raises(ConfigError) as error:
        build_task(named(kind), "mesh")
    assert message in str(error.value)
