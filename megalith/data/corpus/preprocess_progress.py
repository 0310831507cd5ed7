"""What people see while a corpus is encoded: a bar on a terminal, plain lines elsewhere; on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from megalith.common import units


class Progress:
    """Called with the record of each finished part; shows share, MB/s, tokens/s and time left."""

    def __init__(self, stream: TextIO | None = None, every: float = 5.0):
        """stream: stderr by default. every: seconds between plain lines."""
        self.stream = stream or sys.stderr
        self.every, self.started, self.told = every, time.monotonic(), time.monotonic()
        self.bytes = self.size = self.tokens = 0
        self.bar: Any = None
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("encoding"), BarColumn(), TextColumn("{task.description}"))
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
        elif now - self.told >= self.every:
            self.told = now
            print(line, file=self.stream, flush=True)

    def line(self, total: int, elapsed: float) -> str:
        """One line of numbers."""
        elapsed = max(elapsed, 1e-9)
        share = min(self.size / total, 1.0) if total else 1.0
        left = units.duration(elapsed / share - elapsed) if share else "?"
        rate = f"{self.bytes / elapsed / 1e6:.1f} MB/s | {units.count(self.tokens / elapsed)} tokens/s"
        return (
            f"{share:6.1%} | {units.size(self.bytes)} read | {units.count(self.tokens)} tokens | {rate} | {left} left"
        )

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.bar is not None:
            self.bar.stop()
