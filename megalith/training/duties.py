"""Callbacks that act on the run: validate, save, end it early. (Those that report on it are in reporting/.)"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from types import FrameType

from megalith.common.errors import TrainingError
from megalith.training.callbacks import Callback, RunInfo, StepRecord, ValidationRecord
from megalith.training.resume.state import FAILED, SIGNAL, TIME_LIMIT, Progress
from megalith.training.validation import Cursor, Evaluation, ValidationIncomplete


class CountValidation(Callback):
    """Counts the samples of a validation that is due, before the step is saved and before it is measured.

    So a checkpoint says where the next validation reads, whether or not this one comes to its end.
    """

    def __init__(self, cursor: Cursor):
        self.cursor = cursor

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Count."""
        if self.cursor.due():
            self.cursor.advance()


class Validate(Callback):
    """Measure the losses and pass them to other callbacks: every eval_interval steps, and before and after the run.

    With an epoch of a known length this is where each ends, and every eval_interval steps where that is given.

    It comes after SaveCheckpoints: a validation that fails or is killed loses no step. One that fails is reported and
    training continues; at the end of the run it is a TrainingError, when everything is saved.
    """

    def __init__(
        self, measure: Callable[[str], Evaluation], progress: Progress, listeners: Sequence[Callback],
        splits: Sequence[str], known: Collection[str] = (), epoch: int | None = None,
    ):  # fmt: skip
        """measure: losses and metrics of a split by name ("validation", "test"); may raise ValidationIncomplete.

        splits: those that have data. known: those that were measured at the present step before this process started.
        epoch: samples of an epoch.
        """
        self.measure, self.progress, self.listeners, self.splits = measure, progress, listeners, splits
        self.epoch = epoch
        self.done = {(split, progress.iteration) for split in known}

    def on_start(self, run: RunInfo) -> None:
        """Measure before the first step, so that the curve has a beginning; after a resume, where one is missing."""
        done, consumed = self.progress.iteration, self.progress.consumed_train_samples
        batch = -(-consumed // max(1, done))  # as all steps have the same, but for the last of a run
        if done == 0 or (done < run.train_iters and self.due(run, done, consumed, batch)):
            self.validate(run, "validation")

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Validate where the interval ends."""
        due = self.due(run, record.step, record.consumed_samples, record.global_batch_size)
        if due and self.progress.stop is None:
            self.validate(run, "validation")

    def due(self, run: RunInfo, step: int, consumed: int, batch: int) -> bool:
        """Whether a validation is due after this step, with which the run has consumed so many samples."""
        c = run.config.validation
        if self.epoch is None:
            return step % c.interval == 0
        ends = consumed // self.epoch > (consumed - batch) // self.epoch
        return ends or (c.eval_interval is not None and step % c.eval_interval == 0)

    def on_end(self, run: RunInfo) -> None:
        """Measure at the end, where the last step was not measured; then the test data."""
        failed = {}
        for split in ("validation", "test"):
            if self.progress.stop is None and (error := self.validate(run, split, at_end=True)):
                failed[split] = f"{type(error).__name__}: {error}"
        if failed:
            step = self.progress.iteration
            trained = (
                f"All {step} steps are done and saved, but not measured at their end"
                if run.train_iters
                else f"Step {step} is not measured"
            )
            raise TrainingError(
                f"{trained}: "
                + "; ".join(f"{split} data: {text}" for split, text in failed.items())
                + ". Repair the data and give the same command again, which measures what is missing."
            )

    def validate(self, run: RunInfo, split: str, at_end: bool = False) -> Exception | None:
        """Measure and report, unless that is done; returns the error, where the run can continue in spite of it."""
        step = self.progress.iteration
        if split not in self.splits or (split, step) in self.done:
            return None
        started = time.perf_counter()
        try:
            found = self.measure(split)
        except ValidationIncomplete as error:
            self.progress.stop = self.progress.stop or error.reason
            return None if error.reason else error
        except Exception as error:
            if run.world_size > 1:  # the others wait in the middle of a batch
                raise
            print(
                f"megalith: {split} loss at step {step} was not measured:\n{traceback.format_exc()}",
                file=sys.stderr,
                flush=True,
            )
            return error
        self.done.add((split, step))
        record = ValidationRecord(
            step=step, consumed_samples=self.progress.consumed_train_samples, losses=found.losses,
            metrics=found.metrics, split=split, at_end=at_end, seconds=time.perf_counter() - started,
        )  # fmt: skip
        named = [
            dataclasses.replace(record, split=name, losses=part.losses, metrics=part.metrics)
            for name, part in found.parts.items()
        ]
        for each in (*named, record):
            for listener in self.listeners:
                listener.on_validation(run, each)
        return None


class SaveCheckpoints(Callback):
    """Save every save_interval steps, and when the run ends for whatever reason."""

    def __init__(self, save: Callable[[], None], progress: Progress):
        self.save, self.progress = save, progress
        self.saved_at, self.updates = progress.iteration, progress.scheduled_samples

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Save where the interval ends, unless all steps since the last save were skipped, which lose nothing."""
        interval = run.config.checkpoint.save_interval
        new = not record.skipped or self.updates != self.progress.scheduled_samples
        if interval is not None and record.step % interval == 0 and new:
            self.write()

    def on_end(self, run: RunInfo) -> None:
        """Save what has not been saved, unless a step was interrupted half-way."""
        if self.saved_at != self.progress.iteration and self.progress.stop != FAILED:
            self.write()

    def write(self) -> None:
        """Save now."""
        try:
            self.save()
        except BaseException:
            self.progress.stop = FAILED  # nothing more is measured or saved
            raise
        self.saved_at = self.progress.saved = self.progress.iteration
        self.updates = self.progress.scheduled_samples


class SaveFirst(Callback):
    """Comes last, so that its on_end is called first: at the end, the run is saved before anything is measured."""

    def __init__(self, saver: SaveCheckpoints):
        self.on_end = saver.on_end  # type: ignore[method-assign]


class ExitInterval(Callback):
    """End the run after a step that is a multiple of --exit-interval."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Set the reason to end the run, where the interval ends."""
        interval = run.config.resilience.exit_interval
        if interval is not None and record.step % interval == 0:
            self.progress.stop = f"--exit-interval {interval}"


class StopSignal:
    """Returns why the run should end, once SIGTERM, Ctrl-C or SIGHUP arrived or --exit-duration-in-mins is over.

    A second Ctrl-C ends the process at once. A terminal that is closed sends SIGHUP; where it is ignored (nohup), it
    stays ignored. Every process calls this before each step and each batch of a validation, and the answers are reduced
    over all processes before they take effect (train_step and evaluate do that), because a signal reaches processes at
    different steps.
    """

    def __init__(self, handle: bool, minutes: float | None):
        """handle: whether to install the signal handlers; only the main thread can."""
        self.arrived, self.deadline = False, None if minutes is None else time.monotonic() + 60.0 * minutes
        taken = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            taken.append(signal.SIGHUP)
        self.terminals = [number for number in (1, 2) if os.isatty(number)]
        handled = taken if handle and threading.current_thread() is threading.main_thread() else []
        self.previous = {number: signal.signal(number, self.handle_signal) for number in handled}

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.arrived and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.arrived = True
        for terminal in [each for each in self.terminals if not os.isatty(each)]:  # gone; a progress bar would fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)

    def __call__(self) -> str | None:
        """Why this process was asked to stop, if it was."""
        if self.arrived:
            return SIGNAL
        return TIME_LIMIT if self.deadline is not None and time.monotonic() >= self.deadline else None

    def restore(self) -> None:
        """Install the previous signal handlers again."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
