"""TensorBoard scalars, read back."""

import math
import sys

import pytest

from megalith.common.errors import ConfigError
from megalith.training.callbacks import ValidationRecord
from megalith.training.reporting.tensorboard import TensorBoard
from tests.training.records import run_info, step


def test_scalars_under_megatrons_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, run = TensorBoard(str(tmp_path)), run_info(tmp_path)
    board.on_start(run)
    board.on_step(run, step(1))
    board.on_step(run, step(2, zeros=3.0, params_norm=4.0))
    board.on_validation(run, ValidationRecord(step=2, consumed_samples=16, losses={"lm loss": 2.0}))
    board.on_validation(run, ValidationRecord(step=3, consumed_samples=24, losses={"lm loss": math.nan}))
    board.on_end(run)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    twice = [
        "learning-rate",
        "batch-size",
        "lm loss",
        "loss-scale",
        "world-size",
        "grad-norm",
        "num-zeros",
        "params-norm",
    ]
    twice += ["lm loss validation", "lm loss validation ppl"]
    assert set(events.Tags()["scalars"]) == {"iteration-time", *twice, *(f"{name} vs samples" for name in twice)}
    assert [(event.step, event.value) for event in events.Scalars("lm loss")] == [(1, 3.0), (2, 3.0)]
    assert [event.step for event in events.Scalars("lm loss vs samples")] == [8, 16]
    assert events.Scalars("lm loss validation ppl")[0].value == pytest.approx(math.exp(2.0))
    assert math.isnan(events.Scalars("lm loss validation ppl")[1].value)


def test_without_the_package_the_flag_and_the_cure_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"^--tensorboard-dir needs the package tensorboard, .*'\.\[track\]'"):
        TensorBoard(str(tmp_path)).on_start(run_info(tmp_path))


def test_other_ranks_need_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    board, run = TensorBoard(str(tmp_path)), run_info(tmp_path, rank=0, world_size=2)
    board.on_start(run)
    board.on_step(run, step(1))
    board.on_validation(run, ValidationRecord(step=1, consumed_samples=8, losses={}))
    board.on_end(run)
    assert list(tmp_path.iterdir()) == []
