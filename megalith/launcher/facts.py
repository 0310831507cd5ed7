"""What one node says of itself in the preflight: versions, devices, memory, clock, names, paths. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from megalith import __version__
from megalith.common.memory import available_memory
from megalith.launcher.processes import accelerators

VERSIONS = ("torch", "numpy", "triton")  # packages that must be alike on all nodes, shown by name
PROBE = ".megalith-preflight-"  # a file of node 0 in each shared folder: whoever does not see it has another folder


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a run needs of every node: folders that it writes, files that it reads, and how it was started."""

    folders: Sequence[str] = ()
    files: Sequence[str] = ()
    words: Sequence[str] = ()
    processes: int = 1
    nodes: int = 1


def now() -> float:
    """This node's clock, in seconds."""
    return time.time()


def versions() -> dict[str, str]:
    """Versions of Python, of megalith and of what it stands on."""
    found = {"python": platform.python_version(), "megalith": __version__}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def environment() -> dict[str, str]:
    """The virtual environment: where it is, and a fingerprint of the packages in it."""
    names = sorted({f"{each.metadata['Name']}=={each.version}".lower() for each in importlib.metadata.distributions()})
    return {"prefix": sys.prefix, "packages": hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]}


def devices() -> str:
    """The accelerators of this node, as text: how many of which name and memory."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            shown = subprocess.run(query, capture_output=True, text=True, timeout=15, check=False).stdout.split("\n")
            if kinds := [line.strip() for line in shown if line.strip()]:
                return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    count = accelerators()
    return f"{count} accelerators" if count else "none"


def resolves(host: str) -> str | None:
    """Why this node cannot resolve a name; None where it can."""
    try:
        socket.getaddrinfo(host, None)
        return None
    except (OSError, UnicodeError) as error:
        return str(error)


def nearest_folder(path: str) -> pathlib.Path:
    """The folder itself, or the nearest one above it that exists."""
    found = pathlib.Path(path).absolute()
    while not found.exists() and found != found.parent:
        found = found.parent
    return found


def writable(path: str) -> str | None:
    """Why this node cannot write into a folder, or make it; None where it can."""
    probe = nearest_folder(path) / f"{PROBE}{os.getpid()}-{os.urandom(4).hex()}"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
        return None
    except OSError as error:
        return error.strerror or str(error)


def sees_token(path: str, token: str) -> bool:
    """Whether the file that node 0 wrote into a folder is there."""
    return (nearest_folder(path) / f"{PROBE}{token}").is_file()


def size_of(path: str) -> int | None:
    """Bytes of a file, 0 for a folder; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return 0 if os.path.isdir(path) else found.st_size


def gather(wanted: Wanted, number: int, meeting_host: str, token: str) -> dict[str, Any]:
    """All of it, as JSON has it. number: this node's. token: of the files that node 0 wrote."""
    return {
        "number": number,
        "host": socket.gethostname(),
        "versions": versions(),
        "environment": environment(),
        "devices": devices(),
        "memory": available_memory(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "names": resolves(meeting_host),
        "folders": {path: writable(path) for path in wanted.folders},
        "same": {path: sees_token(path, token) for path in wanted.folders},
        "files": {path: size_of(path) for path in wanted.files},
        "words": list(wanted.words),
        "processes": wanted.processes,
        "nodes": wanted.nodes,
        "clock": now(),
    }
