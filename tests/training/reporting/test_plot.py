"""The picture of a run."""

import math

import pytest

from megalith.training.callbacks import ValidationRecord
from megalith.training.reporting.metrics import METRICS_FILE, Metrics
from megalith.training.reporting.plot import LossPlot, draw_loss, smooth
from tests.training.records import run_info, step


def write(folder, losses, validate=()):
    metrics, run = Metrics(), run_info(folder)
    metrics.on_start(run)
    for number, loss in enumerate(losses, 1):
        metrics.on_step(run, step(number, {"lm loss": loss}))
        if number in validate:
            metrics.on_validation(
                run, ValidationRecord(step=number, consumed_samples=0, losses={"lm loss": loss + 0.1})
            )
    metrics.on_validation(
        run, ValidationRecord(step=len(losses), consumed_samples=0, losses={"lm loss": 2.0}, split="test", at_end=True)
    )
    metrics.on_end(run)
    return run


def test_smoothing_keeps_a_constant_and_has_the_half_life_it_says():
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smooth([4.0, 1.0]) == pytest.approx([4.0, 2.0])  # half-life 1: weights 1/2 and 1
    # 100 of 4000 values halve what was
    assert smooth([0.0] * 4000 + [1.0] * 100, 1 / 40)[-1] == pytest.approx(0.5, abs=0.01)


def test_smoothing_does_not_lag_behind_a_steep_start():
    losses = [3.0 + 7.0 * math.exp(-number / 150) for number in range(2000)]
    assert max(abs(mean - loss) for mean, loss in zip(smooth(losses), losses, strict=True)) < 0.15


@pytest.mark.parametrize("steps", [1, 300, 12_001])
def test_a_picture_is_drawn_at_the_end(tmp_path, steps):
    run = write(tmp_path, [3.0 + 7.0 * math.exp(-number / 50) for number in range(steps)], validate=range(50, 301, 50))
    LossPlot().on_end(run)
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", METRICS_FILE]


def test_steps_whose_loss_is_no_number_are_left_out(tmp_path):
    write(tmp_path, [3.0, math.nan, math.inf, 2.0])
    assert draw_loss(tmp_path / METRICS_FILE, tmp_path / "loss.png", "toy")


def test_nothing_to_draw(tmp_path):
    run = write(tmp_path, [])
    LossPlot().on_end(run)
    assert not (tmp_path / "loss.png").exists()
    LossPlot().on_end(run_info(tmp_path / "none"))
    LossPlot().on_end(run_info(tmp_path, rank=0, world_size=2))
    assert not (tmp_path / "loss.png").exists()
