"""Waits for torchrun: passes on what ends a run to its processes, so that they save, and says last why it ended.

torchrun itself ends its processes upon a signal and exits with status 1, whatever they did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from megalith.common.orphans import end_with_parent
from megalith.launcher.rank import RECORD
from megalith.launcher.signals import ENDING, handled

INTERVAL = 0.1  # seconds between two looks
STOPPING = (*ENDING, signal.SIGUSR1)


@dataclasses.dataclass(frozen=True)
class Record:
    """What launcher/rank.py wrote of a process. status: None while it runs; below 0: minus the signal that ended it."""

    rank: int
    pid: int
    began: float
    attempt: int
    status: int | None = None
    ended: float = 0.0
    message: str | None = None

    @property
    def exit_status(self) -> int:
        """As a shell has it: 128 and the signal for a process that a signal ended."""
        return 128 - self.status if self.status < 0 else self.status


class Supervisor:
    """One torchrun and the processes that it started on this node."""

    def __init__(self, log_dir: pathlib.Path):
        """log_dir: torchrun's --log-dir, in which the processes' records are."""
        self.log_dir, self.began, self.signals = log_dir, time.time(), 0
        self.signalled: set[int] = set()

    def records(self) -> list[Record]:
        """Of the processes of the newest attempt on this node."""
        found = []
        for file in self.log_dir.glob(f"*/attempt_*/*/{RECORD}"):
            attempt = int(file.parent.parent.name.removeprefix("attempt_"))
            with contextlib.suppress(OSError, ValueError, TypeError):
                found.append(Record(**json.loads(file.read_text(encoding="utf-8")), attempt=attempt))
        found = [each for each in found if each.began >= self.began]  # the folder may hold older runs
        newest = max((each.attempt for each in found), default=0)
        return [each for each in found if each.attempt == newest]

    def run(self, words: Sequence[str], added: Mapping[str, str], stop_with_stdin: bool = False) -> int:
        """Start the command with these environment variables added, and wait; the exit status."""
        sys.stdout.flush()
        # A process group of its own: Ctrl-C in the terminal reaches this process alone.
        with (
            subprocess.Popen(
                words, env=os.environ | added, stdin=subprocess.DEVNULL, process_group=0,
                preexec_fn=_before_torchrun,
            ) as torchrun,
            handled(STOPPING, lambda number: self._signalled(torchrun)),
        ):  # fmt: skip
            if stop_with_stdin:
                threading.Thread(target=self._await_stdin, args=(torchrun,), daemon=True).start()
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self._report(torchrun.wait(INTERVAL))
                if self.signals:
                    self._stop_processes()

    def _signalled(self, torchrun: subprocess.Popen) -> None:
        self.signals += 1
        if self.signals > 1:  # who asks again does not want to wait: torchrun ends them, or is ended itself
            with contextlib.suppress(ProcessLookupError):
                os.killpg(torchrun.pid, signal.SIGTERM if self.signals == 2 else signal.SIGKILL)

    def _await_stdin(self, torchrun: subprocess.Popen) -> None:
        """Each byte is a signal (launcher/hosts.py), and so is the end."""
        with contextlib.suppress(OSError, ValueError):
            while os.read(0, 1):  # not sys.stdin, whose lock this thread would hold when Python ends
                self._signalled(torchrun)
        self._signalled(torchrun)

    def _stop_processes(self) -> None:
        """SIGTERM to each process once: a run finishes its step, saves, and exits with status 0."""
        for each in self.records():
            if each.status is None and each.pid not in self.signalled:
                self.signalled.add(each.pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each.pid, signal.SIGTERM)

    def _report(self, status: int) -> int:
        """Print why the run ended, unless it ended well; the exit status."""
        records = self.records()
        failed = sorted((each for each in records if each.status), key=lambda each: each.ended)
        if status == 0 or (self.signals and records and all(each.status == 0 for each in records)):
            return 0
        if not failed:
            status = 128 - status if status < 0 else status
            lines = [f"the run has ended with status {status}: torchrun's messages above say why"]
            if records:
                lines = [f"the run has ended with status {status}, because a process on another node has failed"]
        else:
            first, status = failed[0], failed[0].exit_status
            lines = list(_reason(first))
        for line in lines:
            print(line if line.startswith("megalith: ") else f"megalith: {line}", file=sys.stderr)
        sys.stderr.flush()
        return status


def _before_torchrun() -> None:
    """In the new process. Slurm sends a job's signal to all processes of a step; USR1 is for the supervisor alone."""
    end_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # which torchrun and the ranks inherit


def _reason(first: Record) -> Iterator[str]:
    """Why the run ended, by the record of the process that failed first."""
    restarts = f", after {first.attempt} restart{'s' * (first.attempt > 1)}" if first.attempt else ""
    what = f"the run has ended with status {first.exit_status}{restarts}: rank {first.rank} on {os.uname().nodename}"
    if first.status < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-first.status).name
            why = ", as the system does where memory is short" if name == "SIGKILL" else ""
            yield f"{what} (process {first.pid}) was ended by {name}{why}"
            return
    if not first.message:
        yield f"{what} (process {first.pid}) failed; its messages are above"
        return
    yield f"{what} failed with this message:"
    yield first.message
