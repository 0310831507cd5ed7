"""Progress of a run: a bar on a terminal, a line now and then elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from megalith.common import units
from megalith.training.callbacks import Callback, RunInfo, StepRecord, ValidationRecord, print_lines
from megalith.training.reporting.speed import Speed


class ProgressDisplay(Callback):
    """The display of `--progress`: `rich` draws on standard error, `lines` prints on standard output, `none` nothing.

    `auto` is rich where standard error is a terminal that one process writes to, else lines. A line is printed after
    the first step and then at most every `pause` seconds, and not at a step that has a log line.
    """

    def __init__(self, pause: float = 30.0):
        self.pause = pause
        self.bar: Bar | None = None
        self.lines = False
        self.validation: float | None = None
        self.last: StepRecord | None = None

    def on_start(self, run: RunInfo) -> None:
        """Choose the display, and show it at the step where the run starts."""
        mode = run.config.logging.progress
        if mode == "auto":
            mode = "rich" if sys.stderr.isatty() and run.world_size == 1 else "lines"
        self.lines = run.writes and mode == "lines"
        self.speed = Speed(run)
        self.last_printed = -float("inf")
        if run.writes and mode == "rich":
            self.bar = Bar(run)

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Show the step."""
        if not self.bar and not self.lines:
            return
        self.speed.add(record)
        self.last = record
        if self.bar:
            self.bar.show(record.step, self.text(record))
        elif record.step % run.config.logging.log_interval and time.monotonic() - self.last_printed >= self.pause:
            self.last_printed = time.monotonic()
            print_lines(f" step {record.step} of {run.train_iters}: {self.text(record)}")

    def on_validation(self, run: RunInfo, record: ValidationRecord) -> None:
        """Show the loss beside the training loss from now on."""
        if record.split != "validation":
            return
        self.validation = record.total_loss
        if self.bar and self.last:
            self.bar.show(self.last.step, self.text(self.last))

    def on_end(self, run: RunInfo) -> None:
        """Restore the terminal."""
        if self.bar:
            self.bar.stop()
            self.bar = None

    def text(self, record: StepRecord) -> str:
        """Loss, tokens per second, model FLOP/s and MFU (attention in full / at its causal half), time left."""
        parts = [f"loss {record.total_loss:.4f}"]
        if self.validation is not None:
            parts.append(f"validation {self.validation:.4f}")
        parts.append(f"{units.count(self.speed.tokens_per_second)} tokens/s")
        full, half = self.speed.tflops()
        if full:
            parts.append(f"{full:.3g}/{half:.3g} TFLOP/s per device")
        if utilization := self.speed.mfu():
            parts.append(f"MFU {utilization[0]:.1%}/{utilization[1]:.1%}")
        return ", ".join([*parts, f"{self.speed.time_left()} left"])


class Bar(Progress):
    """The bar on a terminal, and a line of numbers under it."""

    def __init__(self, run: RunInfo, console: Console | None = None):
        self.text = "starting"  # before rich's own __init__, which draws
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
            console=console or Console(stderr=True, soft_wrap=True),  # long lines are wrapped by the terminal, not cut
            expand=True,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),  # lines on a terminal are printed above the bar
        )
        self.run: TaskID = self.add_task(run.config.logging.name, total=run.train_iters, completed=run.start_step)
        self.start()

    def get_renderables(self) -> Iterator[RenderableType]:
        """What rich draws, in its own thread."""
        yield from super().get_renderables()
        yield Text(self.text, no_wrap=True, overflow="ellipsis")

    def show(self, step: int, text: str) -> None:
        """Move the bar, change the numbers."""
        self.text = text
        self.update(self.run, completed=step)
