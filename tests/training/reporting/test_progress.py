"""The display in its three forms."""

import io

from rich.console import Console

from megalith.training.callbacks import ValidationRecord
from megalith.training.reporting.progress import Bar, ProgressDisplay
from tests.training.records import run_info, step

FAST = {"flops_per_token_full": 4e9, "flops_per_token_half": 3e9, "peak_flops": 1e13}
TEXT = "loss 3.0000, 2.00 k tokens/s, 8/6 TFLOP/s per device, MFU 80.0%/60.0%, 4.5 s left"


def run_steps(run, steps, **options):
    display = ProgressDisplay(**options)
    display.on_start(run)
    for number in steps:
        display.on_step(run, step(number))
    display.on_end(run)


def test_lines_say_everything(capsys):
    run_steps(run_info(**FAST), [1])
    assert capsys.readouterr().out == f" step 1 of 10: {TEXT}\n"


def test_lines_pause_and_leave_out_steps_that_have_a_log_line(capsys):
    run_steps(run_info(), [1, 2, 3, 4, 5])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [" step 1 of 10"]
    run_steps(run_info(), [1, 2, 3, 4, 5], pause=0.0)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        " step 1 of 10",
        " step 3 of 10",
        " step 5 of 10",
    ]


def test_the_last_validation_is_shown_from_then_on(capsys):
    display, run = ProgressDisplay(), run_info()
    display.on_start(run)
    display.on_validation(run, ValidationRecord(step=0, consumed_samples=0, losses={"lm loss": 9.5}))
    display.on_step(run, step(1))
    assert "loss 3.0000, validation 9.5000, " in capsys.readouterr().out


def test_the_bar_ends_with_the_last_validation_and_not_with_the_test(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    display, run = ProgressDisplay(), run_info(config={"progress": "auto"})
    display.on_start(run)
    display.on_step(run, step(1))
    display.on_validation(run, ValidationRecord(step=1, consumed_samples=8, losses={"lm loss": 2.5}))
    display.on_validation(run, ValidationRecord(step=1, consumed_samples=8, losses={"lm loss": 7.5}, split="test"))
    assert "validation 2.5000" in display.bar.text
    display.on_end(run)


def test_auto_is_lines_where_several_processes_write_to_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run_steps(run_info(rank=1, world_size=2, config={"progress": "auto"}), [1])
    out, err = capsys.readouterr()
    assert out.startswith(" step 1 of 10") and err == ""


def test_lines_above_the_bar_keep_their_ends():
    screen = io.StringIO()
    bar = Bar(run_info(), Console(file=screen, force_terminal=True, width=40, soft_wrap=True))
    bar.console.print("x" * 30 + " " + "y" * 30)
    bar.stop()
    assert "x" * 30 + " " + "y" * 30 in screen.getvalue()


def test_none_and_other_ranks_are_silent(capsys):
    run_steps(run_info(config={"progress": "none"}), [1])
    run_steps(run_info(rank=0, world_size=2), [1])
    run_steps(run_info(rank=0, world_size=2, config={"progress": "rich"}), [1])
    assert capsys.readouterr() == ("", "")


def test_auto_is_lines_where_there_is_no_terminal(capsys):
    run_steps(run_info(config={"progress": "auto"}), [1])
    out, err = capsys.readouterr()
    assert out.startswith(" step 1 of 10: loss 3.0000") and err == ""


def test_auto_is_rich_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run_steps(run_info(config={"progress": "auto", "name": "toy"}), [1])
    out, err = capsys.readouterr()
    assert out == "" and "toy" in err and "1/10" in err


def test_the_bar_shows_where_it_is():
    screen = io.StringIO()
    bar = Bar(run_info(start_step=3, config={"name": "toy"}), Console(file=screen, force_terminal=True, width=80))
    bar.show(4, TEXT)
    bar.stop()
    assert "toy" in screen.getvalue() and "4/10" in screen.getvalue() and "MFU 80.0%" in screen.getvalue()
