"""What a launcher's variables say of this process (torchrun's names), and all that is wrong with them, before anything waits. No torch."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

from megalith.common.errors import problem
from megalith.config.flags.text import Words, fail

CURE = "Start with torchrun, which sets it, or set it for each process"
OTHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}  # launchers with variables of their own
ALLOCATED = ("SLURM_NTASKS", "SLURM_NPROCS")  # that a job may start; it may start one torchrun, too
CONNECTING = {
    "RANK": "the number of this process among those of WORLD_SIZE, counted from 0",
    "MASTER_ADDR": "the address of rank 0, where all meet",
    "MASTER_PORT": "a free port of rank 0, where all meet",
}


def world_size() -> int:
    """Number of processes of this run; 1 where no launcher says otherwise. Raises ConfigError where the variables are wrong."""
    if any(_wrong_numbers()):
        check_connection()  # which tells the rest with them
    return _number("WORLD_SIZE") or 1


def notices() -> list[str]:
    """A line where this is one process alone, and a job was given several."""
    counts = {name: count for name in ALLOCATED if (count := _number(name) or 1) > 1}
    if "WORLD_SIZE" in os.environ or not counts:
        return []
    name, count = next(iter(counts.items()))
    starts = f"torchrun --nproc-per-node {count} -m megalith ... starts {count} that train together"
    return [f"environment variable {name} is {count}, and this is one process, which trains alone: {starts}"]


def rank() -> int:
    """Number of this process among them; 0 where it cannot be told."""
    return _number("RANK") or 0


def check_connection() -> None:
    """Raise one ConfigError with all that keeps the processes of WORLD_SIZE from meeting, as far as one of them can see it."""
    several = "WORLD_SIZE" in os.environ and _number("WORLD_SIZE") != 1
    fail([*_wrong_numbers(), *(_wrong_meeting_point() if several else ())])


def _wrong_numbers() -> Iterator[str]:
    """What is wrong with the numbers of processes. WORLD_SIZE=1 alone is one process, as no variables are."""
    size, mine, local = _number("WORLD_SIZE"), _number("RANK"), _number("LOCAL_RANK")
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        value = _number(name)
        if name in os.environ and (value is None or value < least):
            rule = f"it is a whole number, at least {least}"
            yield problem(
                f"environment variable {name}", os.environ[name], rule, CURE if value is None else f"{CURE} anew"
            )
    if "WORLD_SIZE" not in os.environ:
        if "RANK" in os.environ:
            rule = f"RANK, which is {os.environ['RANK']}, says that this is one process of several"
            yield problem(
                "environment variable WORLD_SIZE", Words("nothing"), rule, f"{CURE}; for one process alone, unset RANK"
            )
        for name, launcher in OTHERS.items():
            if (count := _number(name) or 1) > 1:
                rule = f"{launcher} started {count} processes ({name}), which would all train the same"
                cure = f"Let {launcher} start one torchrun on each machine, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
                yield problem("environment variable WORLD_SIZE", Words("nothing"), rule, cure)
    for name, value in (("RANK", mine), ("LOCAL_RANK", local)):
        if size is not None and value is not None and value >= size >= 1:
            rule = f"processes are numbered from 0 to WORLD_SIZE - 1, {size - 1}"
            yield problem(f"environment variable {name}", value, rule, "Correct the one or the other")


def _wrong_meeting_point() -> Iterator[str]:
    for name, meaning in CONNECTING.items():
        if not os.environ.get(name) and not (name == "RANK" and name in os.environ):
            yield problem(f"environment variable {name}", Words("nothing"), f"it is {meaning}", CURE)
    if address := os.environ.get("MASTER_ADDR"):
        try:
            socket.getaddrinfo(address, None)
        except (OSError, UnicodeError) as error:
            rule = f"it is the name or number of a machine, and this one does not know it ({error})"
            yield problem(
                "environment variable MASTER_ADDR",
                address,
                rule,
                "Correct it, or give rank 0's number, such as 10.0.0.1",
            )
    text = os.environ.get("MASTER_PORT")
    port = _number("MASTER_PORT")
    if text and (port is None or not 0 < port < 65536):
        yield problem(
            "environment variable MASTER_PORT",
            text,
            "a port is a whole number from 1 to 65535",
            "Write for example 29500",
        )
    elif (
        port and rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    ):  # else the launcher listens there
        with socket.socket() as mine:
            mine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                mine.bind(("", port))
            except OSError as error:
                taken = (
                    "another process of this machine listens there" if error.errno == errno.EADDRINUSE else str(error)
                )
                rule = f"rank 0 listens at it for the others, and {taken}"
                yield problem("environment variable MASTER_PORT", port, rule, "Give another one to all processes")


def _number(name: str) -> int | None:
    """The whole number that a variable holds; None where it is not set, or is none."""
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return None
