"""What the launcher's environment variables say of this process, and all that is wrong with them. No torch.

They are checked before anything waits for other processes. The variables have torchrun's names.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

from megalith.common import environment as variables
from megalith.common.errors import problem
from megalith.config.flags.text import Words, fail

CURE = "Start with torchrun, which sets it, or set it for each process"
OTHER_LAUNCHERS = {  # the variable in which another launcher says how many processes it started -> its command
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
CONNECTING = {  # what several processes need to find each other
    "RANK": "the number of this process among those of WORLD_SIZE, counted from 0",
    "MASTER_ADDR": "the address of rank 0, where all processes meet",
    "MASTER_PORT": "a free port of rank 0, where all processes meet",
}


def world_size() -> int:
    """Number of processes of this run; 1 where no launcher says otherwise.

    Raises ConfigError where the variables are wrong.
    """
    if any(_number_problems()):
        check_connection()  # which raises, with the problems of the rendezvous too
    return variables.world_size() or 1


def rank() -> int:
    """Global rank of this process; 0 where no launcher says it."""
    return variables.rank() or 0


def notices() -> list[str]:
    """A line where one process alone runs in a Slurm job that may have several."""
    if variables.has_launcher() or (tasks := variables.tasks_of_slurm_job()) is None:
        return []
    name, count = tasks
    starts = f"srun megalith launch ... starts {count} that train together"
    return [f"environment variable {name} is {count}, and this is one process, which trains alone: {starts}"]


def check_connection() -> None:
    """Raise one ConfigError with everything that one process can see to keep the processes from meeting."""
    several = variables.has_launcher() and variables.world_size() != 1
    fail([*_number_problems(), *(_rendezvous_problems() if several else ())])


def _number_problems() -> Iterator[str]:
    """What is wrong with the numbers of processes. WORLD_SIZE=1 alone is one process, as no variables are."""
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        text, value = variables.variable(name), variables.number(name)
        if text is not None and (value is None or value < least):
            cure = CURE if value is None else f"{CURE} again"
            yield problem(f"The environment variable {name}", text, f"must be a whole number, at least {least}", cure)
    if not variables.has_launcher():
        yield from _missing_world_size()
    size = variables.world_size()
    for name, value in (("RANK", variables.rank()), ("LOCAL_RANK", variables.local_rank())):
        if size is not None and value is not None and value >= size >= 1:
            rule = f"must be from 0 to WORLD_SIZE - 1, {size - 1}"
            yield problem(f"The environment variable {name}", value, rule, f"Correct {name} or WORLD_SIZE")


def _missing_world_size() -> Iterator[str]:
    """Why WORLD_SIZE should be set: other variables say that there are several processes."""
    what, nothing = "The environment variable WORLD_SIZE", Words("nothing")
    if (given := variables.variable("RANK")) is not None:
        rule = f"must be set, because RANK ({given}) says that this is one process of several"
        yield problem(what, nothing, rule, f"{CURE}; for one process alone, unset RANK")
    for name, launcher in OTHER_LAUNCHERS.items():
        if (count := variables.number(name) or 1) > 1:
            rule = f"must be set, because {launcher} started {count} processes ({name}), which would all train the same"
            cure = f"Write {launcher} megalith launch in place of {launcher} megalith, which sets it for each process"
            yield problem(what, nothing, rule, cure)


def _rendezvous_problems() -> Iterator[str]:
    """What is wrong with the variables by which several processes find each other."""
    for name, meaning in CONNECTING.items():
        text = variables.variable(name)
        if text is None or (text == "" and name != "RANK"):  # an empty RANK is a problem of its number
            yield problem(f"The environment variable {name}", Words("nothing"), f"must be {meaning}", CURE)
    if address := variables.main_address():
        try:
            socket.getaddrinfo(address, None)
        except (OSError, UnicodeError) as error:
            rule = f"must be a host name or IP address that this machine can resolve ({error})"
            cure = "Correct it, or give rank 0's IP address, such as 10.0.0.1"
            yield problem("The environment variable MASTER_ADDR", address, rule, cure)
    text, port = variables.main_port(), variables.number("MASTER_PORT")
    if text and (port is None or not 0 < port < 65536):
        rule = "must be a port, a whole number from 1 to 65535"
        yield problem("The environment variable MASTER_PORT", text, rule, "Write for example 29500")
    elif port and rank() == 0 and not variables.torchrun_listens() and (reason := cannot_listen(port)):
        rule = f"must be a port at which rank 0 can listen for the others ({reason})"
        yield problem("The environment variable MASTER_PORT", port, rule, "Give another one to all processes")


def cannot_listen(port: int) -> str | None:
    """Why a process of this machine cannot listen at a port; None where it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            taken = "another process of this machine listens there"
            return taken if error.errno == errno.EADDRINUSE else str(error)
    return None
