"""The lines, character for character."""

import math
import os
import re
import sys

import pytest

from megalith.training.callbacks import ValidationRecord
from megalith.training.reporting.log_lines import LogLines, speed_fields, step_line, validation_line
from tests.training.records import run_info, step


def test_megatrons_line():
    line = step_line(
        run_info(train_iters=500000),
        [step(100, {"lm loss": 9.5}), step(101, {"lm loss": 8.5}, seconds=0.25, loss_scale=4096)],
    )
    assert line == (
        " iteration      101/  500000 | consumed samples:          808 | elapsed time per iteration (ms): 375.0 |"
        " learning rate: 1.500E-04 | global batch size:     8 | lm loss: 9.000000E+00 | loss scale: 4096.0 |"
        " grad norm: 1.250 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


def test_nobody_reads_on(monkeypatch, capsys):
    """As `| head` leaves it: the run continues, and says so once."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        lines, run = LogLines(), run_info(config={"log_interval": 1})
        for number in (1, 2):
            lines.on_step(run, step(number))
        lines.on_validation(run, ValidationRecord(step=2, consumed_samples=16, losses={"lm loss": 1.0}))
    assert capsys.readouterr().err.count("nothing reads standard output any more (Broken pipe); the run continues") == 1


def test_optional_parts_stand_where_megatron_has_them():
    line = step_line(run_info(), [step(1, params_norm=12.3456, zeros=7.0)])
    assert " grad norm: 1.250 | num zeros: 7.0 | params norm: 12.346 | number of skipped" in line
    assert "grad norm" not in step_line(run_info(), [step(1, grad_norm=None)])


def test_skipped_steps_count_and_do_not_enter_the_average():
    records = [step(1, {"lm loss": 4.0}), step(2, {"lm loss": math.inf}, skipped=True), step(3, {"lm loss": 2.0})]
    line = step_line(run_info(), records)
    assert "lm loss: 3.000000E+00 |" in line
    assert line.endswith(" number of skipped iterations:   1 | number of nan iterations:   1 |")


def test_a_loss_of_zero_is_left_out_and_one_that_is_no_number_is_not():
    assert "lm loss" not in step_line(run_info(), [step(1, {"lm loss": 0.0})])
    assert "lm loss" not in step_line(run_info(), [step(1, {"lm loss": 5.0}, skipped=True)])
    assert "lm loss: NAN |" in step_line(run_info(), [step(1, {"lm loss": math.nan})])


def test_several_losses():
    assert " lm loss: 2.000000E+00 | sop loss: 5.000000E-01 |" in step_line(
        run_info(), [step(1, {"lm loss": 2.0, "sop loss": 0.5})]
    )


def test_speed_in_both_conventions():
    run = run_info(world_size=2, flops_per_token_full=4e9, flops_per_token_half=3e9, peak_flops=1e13)
    assert speed_fields(run, [step(3), step(4)]) == (
        " tokens per second: 2000.0 | TFLOP/s per device, full attention: 4 | TFLOP/s per device, causal half: 3 |"
        " MFU, full attention: 40.00% | MFU, causal half: 30.00% | time left: 3.0 s |"
    )
    assert speed_fields(run_info(), [step(4)]) == " tokens per second: 2000.0 | time left: 3.0 s |"


@pytest.mark.parametrize(
    "fields, where",
    [
        ({}, "iteration 20"),
        ({"at_end": True}, "the end of training for val data"),
        ({"at_end": True, "split": "test"}, "the end of training for test data"),
    ],
)
def test_validation(fields, where):
    record = ValidationRecord(step=20, consumed_samples=160, losses={"lm loss": math.log(8.0)}, **fields)
    assert (
        validation_line(record)
        == f" validation loss at {where} | lm loss value: 2.079442E+00 | lm loss PPL: 8.000000E+00 | "
    )


def test_perplexity_stops_at_a_loss_of_20():
    record = ValidationRecord(step=1, consumed_samples=8, losses={"lm loss": 1000.0})
    assert f"PPL: {math.exp(20.0):.6E} |" in validation_line(record)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_has_no_perplexity(value):
    record = ValidationRecord(step=1, consumed_samples=8, losses={"lm loss": value})
    assert f"lm loss value: {value:E} | lm loss PPL: {value:E} |" in validation_line(record)


def test_a_line_per_interval_averages_it_alone(capsys):
    lines, run = LogLines(), run_info()
    lines.on_start(run)
    for number, loss in enumerate((5.0, 3.0, 2.0, 1.0, 9.0), 1):
        lines.on_step(run, step(number, {"lm loss": loss}))
    printed = capsys.readouterr().out.splitlines()
    found = [re.match(r" iteration +(\d+)/ +10 .* lm loss: ([^ ]+) ", line) for line in printed]
    assert [(int(match[1]), float(match[2])) for match in found if match] == [(2, 4.0), (4, 1.5)]
    assert len(printed) == 2 and all(" | tokens per second: " in line for line in printed)


def test_validation_is_printed_between_rules(capsys):
    record = ValidationRecord(step=20, consumed_samples=160, losses={"lm loss": 2.0})
    LogLines().on_validation(run_info(), record)
    rule, line, again = capsys.readouterr().out.splitlines()
    assert rule == again == "-" * (len(line) + 1) and line == validation_line(record)


def test_other_ranks_are_silent(capsys):
    lines, run = LogLines(), run_info(rank=0, world_size=2)
    lines.on_step(run, step(2))
    lines.on_validation(run, ValidationRecord(step=2, consumed_samples=16, losses={"lm loss": 2.0}))
    assert capsys.readouterr().out == "" and lines.records == []
