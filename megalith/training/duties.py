"""Callbacks that act on the run: validate, save, end it early. (Those that tell of it are in callbacks.py.)"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from megalith.training.callbacks import Callback, RunInfo, StepRecord, ValidationRecord
from megalith.training.state import FAILED, Progress


class Validate(Callback):
    """Every eval_interval steps, and before and after the run, measure the losses and tell the other callbacks."""

    def __init__(
        self, measure: Callable[[str], dict[str, float]], progress: Progress, listeners: Sequence[Callback], splits: Sequence[str]
    ):
        """measure: losses of a split by name ("validation", "test"). splits: the ones that have data."""
        self.measure, self.progress, self.listeners, self.splits = measure, progress, listeners, splits
        self.done_at = -1

    def on_start(self, run: RunInfo) -> None:
        """A first point before the first step, so that the curve has a beginning."""
        if self.progress.iteration == 0:
            self.validate(run, "validation")

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Validate when it is time."""
        if record.step % run.config.validation.eval_interval == 0:
            self.validate(run, "validation")

    def on_end(self, run: RunInfo) -> None:
        """A last point, where the run is over and the last step had none; then the test data."""
        if self.progress.stop is not None:
            return
        if self.done_at != self.progress.iteration:
            self.validate(run, "validation", at_end=True)
        self.validate(run, "test", at_end=True)

    def validate(self, run: RunInfo, split: str, at_end: bool = False) -> None:
        """Measure and pass on."""
        if split not in self.splits:
            return
        self.done_at = self.progress.iteration
        started = time.perf_counter()
        record = ValidationRecord(
            step=self.progress.iteration, consumed_samples=self.progress.consumed_train_samples, loss=self.measure(split), split=split,
            at_end=at_end, seconds=time.perf_counter() - started,
        )  # fmt: skip
        for listener in self.listeners:
            listener.on_validation(run, record)


class SaveCheckpoints(Callback):
    """Save every save_interval steps, and when the run ends for whatever reason."""

    def __init__(self, save: Callable[[], None], progress: Progress):
        self.save, self.progress = save, progress
        self.saved_at = progress.iteration

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Save when it is time."""
        interval = run.config.checkpoint.save_interval
        if interval is not None and record.step % interval == 0:
            self.write()

    def on_end(self, run: RunInfo) -> None:
        """Save what has not been saved, unless a step broke off half-way."""
        if self.saved_at != self.progress.iteration and self.progress.stop != FAILED:
            self.write()

    def write(self) -> None:
        """Save now."""
        self.save()
        self.saved_at = self.progress.iteration


class ExitInterval(Callback):
    """End the run after a step that is a multiple of --exit-interval."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Note why the run is to end, if it is."""
        interval = run.config.resilience.exit_interval
        if interval is not None and record.step % interval == 0:
            self.progress.stop = f"--exit-interval {interval}"


class StopSignal:
    """Becomes true when SIGTERM or Ctrl-C arrives, or --exit-duration-in-mins is over; a second Ctrl-C ends at once.

    Every process is asked before each step, and the answer shared before it is acted on (train_step does that), because a
    signal reaches processes at different steps.
    """

    def __init__(self, handle: bool, minutes: float | None):
        """handle: whether to take over the signals; only the main thread can."""
        self.arrived, self.deadline = False, None if minutes is None else time.monotonic() + 60.0 * minutes
        handled = (signal.SIGTERM, signal.SIGINT) if handle and threading.current_thread() is threading.main_thread() else ()
        self.previous = {number: signal.signal(number, self.note) for number in handled}

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.arrived and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.arrived = True

    def __call__(self) -> bool:
        """Whether this process was asked to stop."""
        return self.arrived or (self.deadline is not None and time.monotonic() >= self.deadline)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
