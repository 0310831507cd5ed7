"""Runs one process that torchrun starts, and records how it ended: torchrun says no more than that something failed.

`python -m megalith.launcher.rank COMMAND ...`. The record is process.json beside the error file of torchrun, in the
folder of this attempt and rank; the supervisor on the same node reads it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from megalith.common import environment
from megalith.common.orphans import GRACE, end_with_parent

RECORD = "process.json"
FORWARDED = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


def main(command: Sequence[str]) -> int:
    """Run the command; its exit status, and its signal where one ended it."""
    torchrun = os.getppid()
    end_with_parent(signal.SIGTERM)  # torchrun may be killed; the process then saves, or ends at once
    error_file = environment.error_file()
    folder = pathlib.Path(error_file).parent if error_file else None
    with subprocess.Popen(command, preexec_fn=functools.partial(end_with_parent, signal.SIGKILL)) as process:

        def forward(number: int, frame: FrameType | None) -> None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            if os.getppid() != torchrun:  # nobody is left who would end what does not end by itself
                timer = threading.Timer(GRACE, process.kill)
                timer.daemon = True
                timer.start()

        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, forward)
        facts: dict[str, Any] = {"rank": environment.rank(), "pid": process.pid, "began": time.time()}
        _write(folder, facts)
        status = process.wait()
    _write(folder, facts | {"status": status, "ended": time.time(), "message": _message(error_file)})
    if status < 0:  # so that torchrun's own report names the signal too
        signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -status)
    return status


def _message(error_file: str | None) -> str | None:
    """The message that a process of megalith left for torchrun (cli/main.py: print_error)."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        message = json.loads(pathlib.Path(error_file or "").read_text(encoding="utf-8"))["message"]
        return message if isinstance(message, str) else message["message"]
    return None


def _write(folder: pathlib.Path | None, facts: dict[str, Any]) -> None:
    if folder is None:
        return
    with contextlib.suppress(OSError):  # a record that cannot be written must not end the run
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{RECORD}"
        aside.write_text(json.dumps(facts), encoding="utf-8")
        aside.replace(folder / RECORD)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
