"""Starts a script on this machine: one process by Python itself, several by `python -m torch.distributed.run`."""

from __future__ import annotations

import functools
import os
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from megalith.common import environment as variables
from megalith.common.errors import ConfigError, problem
from megalith.config.environment import cannot_listen
from megalith.config.flags.text import Words, flag
from megalith.config.flags.values import Field, fields_of
from megalith.config.options import option, section
from megalith.launcher.accelerate_config import AccelerateConfig

PORT = 29500  # where machines meet if nothing is said, as in Accelerate


@section
class LaunchOptions:
    """What a command says of the start beside AccelerateConfig; those of TORCHRUN are passed to torchrun."""

    module: bool = option(False, "the script is a module, run as by python -m (also -m)")
    no_python: bool = option(False, "the script is a program, run without python")
    gradient_accumulation_steps: int | None = option(None, "calls in a step, over what the script says", minimum=1)
    num_cpu_threads_per_process: int | None = option(None, "OMP_NUM_THREADS of each process", minimum=1)
    rdzv_conf: str | None = option(None, "torchrun: how machines meet, as in timeout=900,join_timeout=60")
    max_restarts: int | None = option(None, "torchrun: times that failed processes are started again", minimum=0)
    monitor_interval: float | None = option(None, "torchrun: seconds between looks at the processes", minimum=0.0)
    tee: str | None = option(None, "torchrun: streams that are printed and kept in --log-dir, as in 3 (also -t)")
    log_dir: str | None = option(None, "torchrun: folder of the processes' output")
    role: str | None = option(None, "torchrun: name of the processes in its messages")


TORCHRUN = ("rdzv_conf", "max_restarts", "monitor_interval", "tee", "log_dir", "role")


@functools.cache
def launch_options() -> dict[str, Field]:
    """Every field of LaunchOptions by its name."""
    return fields_of(LaunchOptions(), "launch")


def script_problem(options: LaunchOptions, script: Sequence[str]) -> str | None:
    """What keeps `script` from being run: its path (or module, or program) and its own arguments."""
    if not script:
        cure = "Write its path after the flags of megalith launch: megalith launch --num_processes 2 script.py ARGS"
        return problem("The script", Words("nothing"), "must be named", cure)
    if options.module and options.no_python:
        return problem("--module", Words("--no-python too"), "must be given alone", "Leave one out")
    if not options.module and not options.no_python and not pathlib.Path(script[0]).exists():
        cure = f"Correct the path; a module is started by megalith launch -m {script[0]}"
        return problem("The script", script[0], "must be a file that exists", cure)
    return None


def check_port(config: AccelerateConfig) -> None:
    """Raise ConfigError where this machine is the one that all meet at, and cannot listen at the port given."""
    port = config.main_process_port
    if port and config.processes > 1 and config.machine_rank == 0 and (reason := cannot_listen(port)):
        rule = f"must be a port at which this machine can listen for the processes ({reason})"
        cure = "Leave it out for any that is free" if config.num_machines == 1 else "Give another one to all machines"
        raise ConfigError(problem("--main-process-port", port, rule, cure))


def command(config: AccelerateConfig, options: LaunchOptions, script: Sequence[str]) -> list[str]:
    """The words of the command that starts all processes of this machine."""
    kind = ["-m"] if options.module else ["--no-python"] if options.no_python else []
    chosen = [
        word for name in TORCHRUN if (value := getattr(options, name)) is not None for word in (flag(name), str(value))
    ]
    if config.processes == 1 and not chosen:
        return [*script] if options.no_python else [sys.executable, *kind, *script]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *_rendezvous(config)]
    return [*torchrun, "--nproc-per-node", str(config.processes_here), *chosen, *kind, *script]


def _rendezvous(config: AccelerateConfig) -> list[str]:
    """torchrun's flags on where the processes meet."""
    address, port = config.main_process_ip or "127.0.0.1", str(config.main_process_port or PORT)
    if config.num_machines == 1:  # without a port one that is free, so that two runs do not meet
        given = config.main_process_ip or config.main_process_port
        return ["--master-addr", address, "--master-port", port] if given else ["--standalone"]
    machines = ["--nnodes", str(config.num_machines), "--node-rank", str(config.machine_rank)]
    if config.rdzv_backend == "static":
        return [*machines, "--master-addr", address, "--master-port", port]
    return [*machines, "--rdzv-backend", config.rdzv_backend, "--rdzv-endpoint", f"{address}:{port}"]


def environment(config: AccelerateConfig, options: LaunchOptions) -> tuple[dict[str, str], list[str]]:
    """The variables that are set for the processes, and the lines to show on those that nobody asked for."""
    found, lines = config.environment(), []
    if options.gradient_accumulation_steps is not None:
        found["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(options.gradient_accumulation_steps)
    if options.num_cpu_threads_per_process is not None:
        found["OMP_NUM_THREADS"] = str(options.num_cpu_threads_per_process)
    elif config.processes_here > 1 and not variables.threads():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found["OMP_NUM_THREADS"] = str(max(1, cores // config.processes_here))
        lines.append(
            f"OMP_NUM_THREADS is {found['OMP_NUM_THREADS']}: {config.processes_here} processes, {cores} cores; "
            "--num-cpu-threads-per-process says another"
        )
    return found, lines


def text(words: Sequence[str], added: Mapping[str, str]) -> str:
    """The command and its variables as one can type them."""
    return "".join(f"{name}={shlex.quote(value)} \\\n" for name, value in added.items()) + shlex.join(words)


def start(words: Sequence[str], added: Mapping[str, str]) -> NoReturn:
    """Become that command, with these environment variables added: its exit status and signals are this process's.

    Nothing is left in between that could hold a signal, a status or the terminal back, or survive the command.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(words[0], list(words), os.environ | added)
