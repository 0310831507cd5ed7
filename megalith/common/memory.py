"""Memory of this machine."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re

LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")  # of a container


def available_memory() -> int:
    """Bytes that a process can still take without swapping; all that the machine has where the system does not say."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, AttributeError):
        text = pathlib.Path("/proc/meminfo").read_text(encoding="ascii")
        found = 1024 * int(re.search(r"MemAvailable:\s*(\d+) kB", text)[1])  # type: ignore[index]
    with contextlib.suppress(OSError, ValueError):  # `max` where there is no limit
        found = min(found, int(LIMIT.read_text(encoding="ascii")))
    return found
