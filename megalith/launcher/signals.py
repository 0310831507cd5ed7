"""Signals that ask a launcher to end what it started."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def handled(numbers: Sequence[signal.Signals], handle: Callable[[int], None]) -> Iterator[None]:
    """Call `handle` with the number of each of these signals that arrives meanwhile, but of none that nohup ignores."""
    taken = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, lambda number, frame: handle(number)) for number in taken}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
