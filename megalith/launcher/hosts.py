"""Nodes that are reached by ssh alone: a hostfile, and one `megalith launch` started on each of its hosts."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words, fail, flag
from megalith.launcher.local import LaunchOptions
from megalith.launcher.options import NodeOptions, words_of
from megalith.launcher.signals import ENDING, handled
from megalith.launcher.tasks import PORT

LINE = re.compile(r"(\S+)(?:\s+slots\s*=\s*(\d+))?")  # as DeepSpeed and Open MPI write it
SSH = ("ssh", "-o", "BatchMode=yes")  # without a password, which nobody could type
INTERVAL = 0.2  # seconds between two looks at the nodes
GRACE = 30.0  # seconds in which the other nodes may end by themselves after one has failed
OF_EACH = ("nnodes", "node_rank", "rdzv_endpoint", "nproc_per_node", "hostfile", "stop_with_stdin")  # set for each node


class Host(NamedTuple):
    """A line of a hostfile. slots: processes of the host; None: one for each of its accelerators."""

    name: str
    slots: int | None


def read_hostfile(file: pathlib.Path) -> list[Host]:
    """The hosts of a file with lines `host slots=N`. Raises ConfigError with every line that is something else."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            problem("--hostfile", str(file), f"must name a readable file ({why})", "Correct the path")
        ) from error
    hosts, problems = list[Host](), list[str]()
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = LINE.fullmatch(text)
        if found is None or found[2] == "0" or text.startswith("-"):
            rule = "must be a host, and its processes as in `node01 slots=8`"
            problems.append(problem(f"{file}, line {number}", line, rule, "Correct it"))
        elif found[1] in [host.name for host in hosts]:
            problems.append(
                problem(f"{file}, line {number}", line, "must name another host than lines before", "Keep one")
            )
        else:
            hosts.append(Host(found[1], int(found[2]) if found[2] else None))
    if not hosts and not problems:
        problems.append(problem("--hostfile", Words("no host"), "must name one at least", "Write `node01 slots=8`"))
    fail(problems)
    return hosts


def commands(
    hosts: Sequence[Host], nodes: NodeOptions, launch: LaunchOptions, words: Sequence[str], folder: pathlib.Path
) -> list[list[str]]:
    """What is typed for each host: ssh with `megalith launch` in this folder, by the Python of the same path."""
    meeting = nodes.rdzv_endpoint or f"{hosts[0].name.rpartition('@')[2]}:{PORT}"  # without the user that ssh is given
    found = []
    for number, host in enumerate(hosts):
        inner = [sys.executable, "-m", "megalith", "launch"]
        if len(hosts) > 1:
            inner += ["--nnodes", str(len(hosts)), "--node-rank", str(number), "--rdzv-endpoint", meeting]
        slots = nodes.nproc_per_node or host.slots
        inner += ["--nproc-per-node", str(slots)] if slots else []
        inner += [*words_of(nodes, launch, OF_EACH), "--stop-with-stdin", *words]
        found.append([*SSH, host.name, f"cd {shlex.quote(str(folder))} && exec {shlex.join(inner)}"])
    return found


def check(nodes: NodeOptions) -> None:
    """Raise ConfigError for options that a hostfile says itself, and where there is no ssh."""
    given = [flag(name) for name in ("nnodes", "node_rank") if getattr(nodes, name) is not None]
    if given:
        rule = "must be left out: the lines of --hostfile are the nodes"
        raise ConfigError(problem(" and ".join(given), Words("given"), rule, "Leave it out"))
    if shutil.which(SSH[0]) is None:
        raise ConfigError("--hostfile needs ssh, which is not on this machine.")


def run(hosts: Sequence[Host], words: Sequence[Sequence[str]]) -> int:
    """Start all nodes and wait; the exit status of the node that failed first, or 0.

    A signal reaches each node as a byte of its standard input, upon which its processes save and stop; a second one
    too, upon which they end; a third one ends ssh.
    """
    running = {
        host.name: subprocess.Popen(list(each), stdin=subprocess.PIPE, bufsize=0, process_group=0)
        for host, each in zip(hosts, words)
    }  # fmt: skip
    failed: tuple[str, int] | None = None
    ended = False
    signals = 0

    def stop(number: int) -> None:
        nonlocal signals
        signals += 1
        if signals > 2:
            _end(running)
        _send_stop(running)

    with handled(ENDING, stop):
        deadline = float("inf")
        while any(process.poll() is None for process in running.values()):
            time.sleep(INTERVAL)
            bad = [(name, process.returncode) for name, process in running.items() if process.returncode]
            if bad and failed is None:
                failed, deadline = bad[0], time.monotonic() + GRACE
            if time.monotonic() > deadline and not ended:
                _send_stop(running)
                ended, deadline = True, time.monotonic() + GRACE / 3
            elif time.monotonic() > deadline:  # those that still wait for the one that has failed
                _end(running)
                deadline = float("inf")
    bad = [(name, process.returncode) for name, process in running.items() if process.returncode]
    failed = failed or (bad[0] if bad else None)
    if failed is None:
        return 0
    name, status = failed
    status = 128 - status if status < 0 else status
    reason = "its messages are above" if status != 255 else "ssh could not reach it, or lost it"
    print(
        f"megalith: the run has ended with status {status}: node {name} has failed; {reason}",
        file=sys.stderr,
        flush=True,
    )
    return status


def _send_stop(running: dict[str, subprocess.Popen]) -> None:
    for process in running.values():
        with contextlib.suppress(OSError):  # it has ended
            process.stdin.write(b"\n")


def _end(running: dict[str, subprocess.Popen]) -> None:
    for process in running.values():
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
