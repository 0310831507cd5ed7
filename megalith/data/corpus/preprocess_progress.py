"""What the user sees on stderr while a corpus is encoded: a bar on a terminal, lines of text elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from megalith.common import units


class Progress:
    """Called with the record of each finished part; shows the fraction done, MB/s, tokens/s and time left."""

    def __init__(self, stream: TextIO | None = None, interval: float = 5.0, title: str = "encoding"):
        """stream: stderr by default. interval: seconds between lines where there is no bar. title: of the bar."""
        self.stream = stream or sys.stderr
        self.interval, self.started, self.last_printed = interval, time.monotonic(), time.monotonic()
        self.bytes = self.size = self.tokens = 0
        self.bar: Any = None
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, console=Console(file=self.stream), transient=True)
            self.task = self.bar.add_task("", total=None)
            self.bar.start()

    def __call__(self, record: dict, total: int) -> None:
        """A part is finished; total: bytes of the whole input as they lie on the disk."""
        self.size += record["size"]
        self.bytes += record["bytes"]
        self.tokens += record["tokens"]
        now = time.monotonic()
        line = self.line(total, now - self.started)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.size, total=total, description=line)
        elif now - self.last_printed >= self.interval:
            self.last_printed = now
            print(line, file=self.stream, flush=True)

    def line(self, total: int, elapsed: float) -> str:
        """One line of numbers."""
        elapsed = max(elapsed, 1e-9)
        fraction = min(self.size / total, 1.0) if total else 1.0
        left = units.duration(elapsed / fraction - elapsed) if fraction else "?"
        done = f"{fraction:6.1%} | {units.size(self.bytes)} read | {units.count(self.tokens)} tokens"
        rate = f"{self.bytes / elapsed / 1e6:.1f} MB/s | {units.count(self.tokens / elapsed)} tokens/s"
        return f"{done} | {rate} | {left} left"

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.bar is not None:
            self.bar.stop()
