"""One writer of an output at a time, also between machines that share a file system.

A lock is a file `.{name}.lock` beside the output that names its holder. flock is not used: many network file systems
keep it within one machine, or refuse it. A hard link is atomic on all of them, and appears with its whole content. The
holder touches its lock every HEARTBEAT seconds, so that others can distinguish a live holder from one whose machine
died.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from megalith.common.errors import MegalithError

HEARTBEAT = 10.0  # seconds between two touches
POLL_INTERVAL = 1.0  # seconds between two checks of a lock that is waited for
STALE = 90.0  # seconds without a touch after which a holder on another machine is taken for dead


class LockedError(MegalithError):
    """Another process writes the same output."""


@contextlib.contextmanager
def locked(
    output: str | os.PathLike,
    *,
    inside: bool = False,
    patient: bool = False,
    cure: str = "Wait for it, or choose another output",
    notice: Callable[[str], None] = lambda line: None,
) -> Iterator[Callable[[], None]]:
    """Hold the lock of `output` (a file, folder or prefix, which need not exist) within the block.

    inside: the lock lies in the folder `output`, which is made, and removed if it is left empty: for folders that
        machines mount at different paths, or that have several names.
    patient: a holder on another machine, or in another container, has up to STALE seconds to show that it lives, before
        it is taken for alive: for jobs that are started again on another machine when they have died.
    The block gets a check, to be called before its result is put in place: it raises LockedError where the lock was
    lost meanwhile, to a process that took this one for dead while it was suspended.
    The lock of a dead process is taken over, with a line to `notice`. Raises LockedError that names a live holder
    (command, host, process, since when) and leaves everything as it is. A second lock of one output is refused within a
    process too.
    """
    output = pathlib.Path(os.path.realpath(output))  # one output has one lock, however it is spelled
    path = output / ".lock" if inside else output.with_name(f".{output.name}.lock")
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()] if inside else []
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = _lock_content()
    _acquire(path, owner, output, cure, notice, patient)
    done = threading.Event()
    threading.Thread(target=_touch_until, args=(done, path, owner), daemon=True).start()
    try:
        yield lambda: _check(path, owner, output)
    finally:
        done.set()
        if _read(path) == owner:  # it may have been taken over while this process was suspended
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _check(path: pathlib.Path, owner: dict, output: pathlib.Path) -> None:
    holder = _read(path)
    if holder != owner:
        taken = f"{_holder_text(holder)} has it" if holder is not None else "who took it has ended"
        raise LockedError(
            f"{output}: this process was suspended, was taken for dead and lost its lock; {taken}. "
            f"Its result is not put in place."
        )


def _acquire(
    path: pathlib.Path, owner: dict, output: pathlib.Path, cure: str, notice: Callable[[str], None], patient: bool
) -> None:
    """Make the file `path` with the content `owner`, or raise LockedError."""
    draft = path.with_name(f"{path.name}.{owner['nonce']}")
    draft.write_text(json.dumps(owner), encoding="utf-8")
    seen = None
    try:
        while True:
            with contextlib.suppress(FileExistsError):
                _create(draft, path)
                return
            holder = _read(path)
            if holder is None:
                continue  # released between the two calls
            if not _is_dead(holder, path, draft):
                touch = (holder.get("nonce"), _touched(path))
                if patient and not _is_here(holder) and seen in (None, touch):
                    if seen is None:
                        notice(f"{output}: looking for up to {STALE:g} s whether {_holder_text(holder)} still runs")
                    seen = touch
                    time.sleep(POLL_INTERVAL)
                    continue
                writer = _holder_text(holder)
                raise LockedError(
                    f"{output} is being written by {writer}; only one process may write it at a time. {cure}."
                )
            # Of several that find a dead holder's lock, one moves it away; a live one moved by mistake is put back.
            moved = path.with_name(f"{path.name}.{owner['nonce']}.stale")
            try:
                os.rename(path, moved)
            except FileNotFoundError:
                continue
            if _read(moved) != holder:
                with contextlib.suppress(FileExistsError):
                    _create(moved, path)
            else:
                notice(f"{output}: the lock of {_holder_text(holder)} is taken over, because that process has ended")
            moved.unlink()
    finally:
        draft.unlink()


def _create(draft: pathlib.Path, path: pathlib.Path) -> None:
    """Give `draft` the name `path` too; FileExistsError where that is taken."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with open(path, "x", encoding="utf-8") as file:
            file.write(draft.read_text(encoding="utf-8"))


def _lock_content() -> dict:
    """The content of a lock: which process holds it."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "pids": _pid_space(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv)[:500],
        "nonce": os.urandom(8).hex(),
    }


def _holder_text(holder: dict) -> str:
    if "pid" not in holder:
        return "a process that its lock does not name"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')} ({holder.get('command')})"


def _read(path: pathlib.Path) -> dict | None:
    """The content of the lock; None where there is no lock, {} where it cannot be understood."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_dead(holder: dict, path: pathlib.Path, draft: pathlib.Path) -> bool:
    """Whether the holder is gone: by its process number on this machine, else by the age of its last touch."""
    if _is_here(holder):
        return _start_of(holder.get("pid")) != holder.get("started")
    os.utime(draft)  # now, by the clock of the file system: machines' clocks may differ
    try:
        return draft.stat().st_mtime - path.stat().st_mtime > STALE
    except FileNotFoundError:
        return False


def _is_here(holder: dict) -> bool:
    """Whether the holder's process number can be looked up here."""
    return holder.get("host") == socket.gethostname() and holder.get("pids") == _pid_space()


def _touched(path: pathlib.Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _pid_space() -> str:
    """Tells boots and containers apart, in which equal process numbers are different processes."""
    try:
        return (
            f"{pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
        )
    except OSError:
        return ""


def _start_of(pid: object) -> str | None:
    """When the process `pid` of this machine started, None if there is none: numbers are used again."""
    if not isinstance(pid, int) or pid <= 0:
        return None
    try:
        state, *rest = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except OSError:
        pass
    if os.path.isdir("/proc/self"):
        return None
    try:
        os.kill(pid, 0)  # a system without /proc
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def _touch_until(done: threading.Event, path: pathlib.Path, owner: dict) -> None:
    while not done.wait(HEARTBEAT):
        if _read(path) != owner:
            return
        with contextlib.suppress(OSError):
            os.utime(path)
