"""The environment variables that a launcher or a user sets, each read by one function, here alone. No torch.

Those of a launcher have the names that torchrun gives them. config/environment.py checks them against each other.
"""

from __future__ import annotations

import os
import pathlib


def variable(name: str) -> str | None:
    """The text of an environment variable; None where it is not set."""
    return os.environ.get(name)


def number(name: str) -> int | None:
    """The whole number that a variable holds; None where it is not set, or holds none."""
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return None


def rank() -> int | None:
    """RANK: the number of this process among all of the run, counted from 0."""
    return number("RANK")


def world_size() -> int | None:
    """WORLD_SIZE: how many processes the run has."""
    return number("WORLD_SIZE")


def local_rank() -> int | None:
    """LOCAL_RANK: the number of this process among those of its machine, counted from 0."""
    return number("LOCAL_RANK")


def has_launcher() -> bool:
    """Whether a launcher started this process: WORLD_SIZE is set."""
    return variable("WORLD_SIZE") is not None


def main_address() -> str | None:
    """MASTER_ADDR: the machine of rank 0, where all processes meet."""
    return variable("MASTER_ADDR")


def main_port() -> str | None:
    """MASTER_PORT: the port of rank 0, where all processes meet, as text."""
    return variable("MASTER_PORT")


def started_by_torchrun() -> bool:
    """Whether torchrun is an ancestor of this process: TORCHELASTIC_RUN_ID is set."""
    return variable("TORCHELASTIC_RUN_ID") is not None


def torchrun_listens() -> bool:
    """TORCHELASTIC_USE_AGENT_STORE: whether torchrun itself listens at MASTER_PORT, in place of rank 0."""
    return variable("TORCHELASTIC_USE_AGENT_STORE") == "True"


def error_file() -> str | None:
    """TORCHELASTIC_ERROR_FILE: the file in which torchrun expects the error of this process; None or "" for none."""
    return variable("TORCHELASTIC_ERROR_FILE")


def tasks_of_slurm_job() -> tuple[str, int] | None:
    """The variable that says how many processes a Slurm job may start, and how many where they are several."""
    counts = ((name, number(name) or 1) for name in ("SLURM_NTASKS", "SLURM_NPROCS"))
    return next(((name, count) for name, count in counts if count > 1), None)


def ray_address() -> str | None:
    """RAY_ADDRESS: the Ray cluster to connect to; None: one on this machine."""
    return variable("RAY_ADDRESS")


def cache_folder() -> pathlib.Path:
    """Where downloads are kept: MEGALITH_CACHE, or megalith/ in the user's cache (XDG_CACHE_HOME, or ~/.cache)."""
    user_cache = variable("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(variable("MEGALITH_CACHE") or pathlib.Path(user_cache) / "megalith")


def accelerate_config_file() -> pathlib.Path:
    """Where `accelerate config` writes its YAML unless told otherwise: below HF_HOME, or the user's cache."""
    user_cache = variable("XDG_CACHE_HOME") or "~/.cache"
    home = pathlib.Path(variable("HF_HOME") or pathlib.Path(user_cache) / "huggingface").expanduser()
    return home / "accelerate" / "default_config.yaml"


def threads() -> str | None:
    """OMP_NUM_THREADS: the threads of each process on the CPU, as text."""
    return variable("OMP_NUM_THREADS")
