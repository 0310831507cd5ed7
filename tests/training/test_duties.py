"""What happens every so often, at the end, and on a signal."""

import os
import pathlib
import signal
import time

import pytest

from megalith.training.callbacks import Callback, RunInfo, StepRecord
from megalith.training.duties import ExitInterval, SaveCheckpoints, StopSignal, Validate
from megalith.training.resume.state import FAILED, SIGNAL, TIME_LIMIT, Progress
from megalith.training.validation import Evaluation
from tests.tiny import tiny_config


def test_a_terminal_that_was_closed_is_not_written_to():
    """Its progress bar would fail, and the run with it, though all is saved."""
    signals, (master, slave) = StopSignal(True, None), os.openpty()
    try:
        signals.terminals = [slave]
        os.close(master)
        with pytest.raises(OSError):
            os.write(slave, b"bar")
        signals.handle_signal(signal.SIGHUP, None)
        assert os.write(slave, b"bar") == 3 and signals() == SIGNAL
    finally:
        signals.restore()
        os.close(slave)


def run_info(**changes) -> RunInfo:
    return RunInfo(config=tiny_config("unused", "unused", **changes), folder=pathlib.Path("unused"), train_iters=12)


def step(number: int) -> StepRecord:
    rates = {"learning_rate": 1.0, "weight_decay": 0.0}
    return StepRecord(
        step=number,
        consumed_samples=8 * number,
        losses={"lm loss": 1.0},
        global_batch_size=8,
        tokens=1,
        seconds=1.0,
        **rates,
    )


class Listener(Callback):
    def __init__(self):
        self.records = []

    def on_validation(self, run, record):
        self.records.append((record.step, record.split, record.losses))


def drive(callback: Callback, progress: Progress, run: RunInfo, steps: int, end: bool = True) -> None:
    callback.on_start(run)
    for number in range(progress.iteration + 1, steps + 1):
        progress.iteration = number
        callback.on_step(run, step(number))
    if end:
        callback.on_end(run)


def test_validation_before_between_and_after():
    listener, progress = Listener(), Progress()
    duty = Validate(lambda split: Evaluation({"lm loss": 2.0}, {}), progress, [listener], ["validation", "test"])
    drive(duty, progress, run_info(eval_interval=5), 12)
    assert [(number, split) for number, split, _ in listener.records] == [
        (0, "validation"),
        (5, "validation"),
        (10, "validation"),
        (12, "validation"),
        (12, "test"),
    ]


def test_no_validation_twice_at_the_end_and_none_when_stopped():
    listener, progress = Listener(), Progress()
    drive(
        Validate(lambda split: Evaluation({}, {}), progress, [listener], ["validation"]),
        progress,
        run_info(eval_interval=6),
        12,
    )
    assert [number for number, *_ in listener.records] == [0, 6, 12]
    listener, progress = Listener(), Progress(iteration=3)
    duty = Validate(lambda split: Evaluation({}, {}), progress, [listener], ["validation"])
    drive(duty, progress, run_info(eval_interval=6), 4, end=False)
    progress.stop = "asked"
    duty.on_end(run_info())
    assert listener.records == []


def test_checkpoints_at_intervals_and_at_the_end_once():
    saved, progress = [], Progress()
    drive(SaveCheckpoints(lambda: saved.append(progress.iteration), progress), progress, run_info(save_interval=5), 12)
    assert saved == [5, 10, 12]
    saved.clear()
    progress = Progress()
    drive(SaveCheckpoints(lambda: saved.append(progress.iteration), progress), progress, run_info(save_interval=6), 12)
    assert saved == [6, 12]


def test_nothing_is_saved_after_an_error():
    saved, progress = [], Progress()
    duty = SaveCheckpoints(lambda: saved.append(1), progress)
    drive(duty, progress, run_info(), 3, end=False)
    progress.stop = FAILED
    duty.on_end(run_info())
    assert saved == []


def test_exit_interval():
    progress = Progress()
    drive(ExitInterval(progress), progress, run_info(exit_interval=4), 3)
    assert progress.stop is None
    drive(ExitInterval(progress), progress, run_info(exit_interval=4), 4)
    assert "--exit-interval 4" in progress.stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_and_is_given_back(number):
    held = signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored
    try:
        asked = StopSignal(True, None)
        assert not asked()
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert asked() == SIGNAL
        asked.restore()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, held)


def test_nohup_holds():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        asked = StopSignal(True, None)
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)
        assert not asked()
        asked.restore()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_ends_at_once():
    asked = StopSignal(True, None)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    finally:
        asked.restore()


def test_duration():
    assert StopSignal(False, 0.0)() == TIME_LIMIT
    assert not StopSignal(False, 10.0)()
