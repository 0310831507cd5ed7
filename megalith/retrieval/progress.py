"""Lines that show how far long work is."""

from __future__ import annotations

import dataclasses
import sys
import time

from megalith.common import units

LINE_SECONDS = 5.0  # between two lines


@dataclasses.dataclass
class Progress:
    """Lines on stderr: how much of how much is done. Other processes are taken to be as far as this one."""

    total: int
    shown: bool
    what: str = "texts"

    def __post_init__(self) -> None:
        self.done, self.started = 0, time.monotonic()
        self.printed = self.started

    def add(self, count: int) -> None:
        """Count what is done, and print a line every few seconds."""
        self.done, now = min(self.total, self.done + count), time.monotonic()
        if self.shown and now - self.printed >= LINE_SECONDS:
            self.printed, rate = now, self.done / (now - self.started)
            left = units.duration((self.total - self.done) / rate)
            print(
                f"{self.done} of {self.total} {self.what}, {rate:.0f} a second, {left} left",
                file=sys.stderr,
                flush=True,
            )
