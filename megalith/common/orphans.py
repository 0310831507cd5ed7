"""A process whose launcher is gone ends too: it would not learn that the others have died, and block its successor."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import select
import signal
import sys
import threading
from collections.abc import Iterator

from megalith.common import environment

TORCHRUN_MARK = b"\0TORCHELASTIC_RUN_ID="  # in the environment of every process that torchrun started
GRACE = 30.0  # seconds to finish a step and save, as torchrun grants after its SIGTERM
POLL_INTERVAL = 1.0  # seconds between two checks, where the system cannot wake this process
PR_SET_PDEATHSIG = 1  # of prctl(2)


@contextlib.contextmanager
def ends_with_launcher(grace: float = GRACE) -> Iterator[None]:
    """Within the block, end this process when torchrun, if it was started by one, has died without ending it (kill -9).

    It gets SIGTERM, upon which a run saves and ends; if it still runs `grace` seconds later, for example inside a
    collective that never ends, it exits with status 1.
    """
    done = threading.Event()
    launcher = _launcher()
    if launcher is not None:
        threading.Thread(target=_watch, args=(launcher, done, grace), daemon=True, name="launcher").start()
    try:
        yield
    finally:
        done.set()


def end_with_parent(number: int) -> None:
    """In a new process, before it becomes its program: have it sent this signal when its parent dies (Linux alone)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _watch(launcher: int, done: threading.Event, grace: float) -> None:
    _await_end(launcher, done)
    if done.is_set():
        return
    message = f"megalith: rank {environment.rank()}: the launcher, process {launcher}, has died"
    _print_error(f"{message}; this process saves, if it can, and ends")
    # To the main thread: a signal to this one would leave that one asleep.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    if not done.wait(grace):
        _print_error(f"{message} {grace:g} s ago; this process ends now")
        os._exit(1)


def _await_end(launcher: int, done: threading.Event) -> None:
    """Wait until a process has ended, or `done`."""
    parent = os.getppid()
    try:
        descriptor = os.pidfd_open(launcher)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # not Linux, or an old or simulated one
        while not done.wait(POLL_INTERVAL):
            if os.getppid() != parent:
                return
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not done.is_set() and not poll.poll(1000 * POLL_INTERVAL):
            pass
    finally:
        os.close(descriptor)


def _launcher() -> int | None:
    """The process of torchrun: the nearest ancestor without the variables that it sets.

    None where torchrun started none of them, or where that is process 1.
    """
    if not environment.started_by_torchrun():
        return None
    process = os.getppid()
    with contextlib.suppress(OSError, ValueError, IndexError):  # a shell script may be in between
        while process > 1 and TORCHRUN_MARK in b"\0" + pathlib.Path(f"/proc/{process}/environ").read_bytes():
            process = int(pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return process if process > 1 else None  # with process 1 its whole container ends


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone with the launcher
        print(line, file=sys.stderr, flush=True)
