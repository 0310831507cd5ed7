"""metrics.jsonl: written as the run goes, cut back where a run resumes."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from megalith.training.callbacks import ValidationRecord
from megalith.training.reporting.metrics import METRICS_FILE, Metrics, drop_after, read_metrics
from tests.training.records import run_info, step


def write(folder, steps, start_step=0, validate=()):
    metrics, run = Metrics(), run_info(folder, start_step=start_step)
    metrics.on_start(run)
    for number in steps:
        metrics.on_step(run, step(number, {"lm loss": 10.0 / number}))
        if number in validate:
            metrics.on_validation(
                run, ValidationRecord(step=number, consumed_samples=number * 8, losses={"lm loss": 5.0}, seconds=2.0)
            )
    metrics.on_end(run)


def numbers(folder):
    return [(line["step"], "loss" in line) for line in read_metrics(folder / METRICS_FILE)]


def test_one_object_per_step_and_validation(tmp_path):
    write(tmp_path / "new", [1, 2], validate=[2])
    first, second, validation = [
        json.loads(line) for line in (tmp_path / "new" / METRICS_FILE).read_text().splitlines()
    ]
    assert first == {
        "step": 1, "loss": 10.0, "grad_norm": 1.25, "learning_rate": 1.5e-4, "tokens": 1000, "seconds": 0.5,
        "consumed_samples": 8, "global_batch_size": 8, "weight_decay": 0.01, "loss_scale": 1.0, "skipped": False,
    }  # fmt: skip
    assert second["step"] == 2
    assert validation == {"step": 2, "validation_loss": 5.0, "seconds": 2.0, "consumed_samples": 16}


def test_parts_and_extras_where_there_are_some(tmp_path):
    metrics, run = Metrics(), run_info(tmp_path)
    metrics.on_start(run)
    metrics.on_step(run, step(1, {"lm loss": 2.0, "sop loss": 0.5}, params_norm=3.0, zeros=4.0))
    metrics.on_validation(
        run, ValidationRecord(step=1, consumed_samples=8, losses={"lm loss": 1.0, "sop loss": 0.5}, split="test")
    )
    metrics.on_end(run)
    first, test = read_metrics(tmp_path / METRICS_FILE)
    assert first["loss"] == 2.5 and first["losses"] == {"lm loss": 2.0, "sop loss": 0.5}
    assert (first["params_norm"], first["zeros"]) == (3.0, 4.0)
    assert test["test_loss"] == 1.5 and test["test_losses"]["sop loss"] == 0.5


def test_a_line_is_there_as_soon_as_the_step_is(tmp_path):
    metrics, run = Metrics(), run_info(tmp_path)
    metrics.on_start(run)
    metrics.on_step(run, step(1))
    assert numbers(tmp_path) == [(1, True)]
    metrics.on_end(run)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_keep_every_bit(tmp_path_factory, loss):
    folder = tmp_path_factory.mktemp("bits")
    metrics, run = Metrics(), run_info(folder)
    metrics.on_start(run)
    metrics.on_step(run, step(1, {"lm loss": loss}))
    metrics.on_end(run)
    assert next(read_metrics(folder / METRICS_FILE))["loss"] == loss


def test_what_is_no_number_is_null(tmp_path):
    metrics, run = Metrics(), run_info(tmp_path)
    metrics.on_start(run)
    metrics.on_step(run, step(1, {"lm loss": math.nan}, grad_norm=math.inf))
    metrics.on_end(run)
    line = next(read_metrics(tmp_path / METRICS_FILE))
    assert line["loss"] is None and line["grad_norm"] is None


def test_a_resume_drops_what_will_be_done_again(tmp_path):
    write(tmp_path, [1, 2, 3, 4], validate=[2, 4])
    write(tmp_path, [3, 4, 5], start_step=2)
    assert numbers(tmp_path) == [(1, True), (2, True), (2, False), (3, True), (4, True), (5, True)]


def test_validating_an_older_checkpoint_drops_nothing(tmp_path):
    write(tmp_path, [1, 2, 3])
    metrics, run = Metrics(), run_info(tmp_path, start_step=1, config={"skip_train": True})
    metrics.on_start(run)
    metrics.on_validation(run, ValidationRecord(step=1, consumed_samples=8, losses={"lm loss": 5.0}))
    metrics.on_end(run)
    assert numbers(tmp_path) == [(1, True), (2, True), (3, True), (1, False)]


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 3, "lo')
    write(tmp_path, [3], start_step=2)
    assert numbers(tmp_path) == [(1, True), (2, True), (3, True)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS_FILE]


def test_a_fresh_start_empties_the_file_and_no_file_is_no_error(tmp_path):
    write(tmp_path, [1, 2])
    drop_after(tmp_path / METRICS_FILE, 0)
    assert numbers(tmp_path) == []
    drop_after(tmp_path / "none", 0)


def test_other_ranks_write_nothing(tmp_path):
    metrics, run = Metrics(), run_info(tmp_path, rank=0, world_size=2)
    metrics.on_start(run)
    metrics.on_step(run, step(1))
    metrics.on_end(run)
    assert list(tmp_path.iterdir()) == []
