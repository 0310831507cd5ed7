"""The environment variables that a launcher or a user sets, each read by one function, here alone. No torch.

Those of a launcher have the names that torchrun gives them. config/environment.py checks them against each other.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

from megalith.common.errors import ConfigError, problem

TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")  # as Accelerate reads them


def variable(name: str) -> str | None:
    """The text of an environment variable; None where it is not set."""
    return os.environ.get(name)


def number(name: str) -> int | None:
    """The whole number that a variable holds; None where it is not set, or holds none."""
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return None


@contextlib.contextmanager
def hidden(name: str) -> Iterator[None]:
    """Within the block a variable is not set: another package reads it, and would act on it."""
    text = os.environ.pop(name, None)
    try:
        yield
    finally:
        if text is not None:
            os.environ[name] = text


def truth(text: str) -> bool | None:
    """Whether a text means yes or no, in any case; None where it is neither."""
    return True if text.lower() in TRUE else False if text.lower() in FALSE else None


def boolean(name: str) -> bool | None:
    """Yes or no as a variable says it; None where it is not set, or empty. Raises ConfigError for another text."""
    if not (text := variable(name)):
        return None
    if (value := truth(text)) is None:
        rule = "must be true or false (or yes, no, on, off, 1, 0)"
        raise ConfigError(problem(f"The environment variable {name}", text, rule, "Correct it, or unset it"))
    return value


def rank() -> int | None:
    """RANK: the number of this process among all of the run, counted from 0."""
    return number("RANK")


def world_size() -> int | None:
    """WORLD_SIZE: how many processes the run has."""
    return number("WORLD_SIZE")


def local_rank() -> int | None:
    """LOCAL_RANK: the number of this process among those of its machine, counted from 0."""
    return number("LOCAL_RANK")


def local_world_size() -> int | None:
    """LOCAL_WORLD_SIZE: how many processes of the run this machine has."""
    return number("LOCAL_WORLD_SIZE")


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


def uses_megatron_lm() -> bool:
    """ACCELERATE_USE_MEGATRON_LM: whether Accelerate's launcher was asked for Megatron-LM."""
    return bool(boolean("ACCELERATE_USE_MEGATRON_LM"))


def mixed_precision() -> str | None:
    """ACCELERATE_MIXED_PRECISION: no, bf16 or fp16, as Accelerate's launcher sets it; None where it is not set."""
    return variable("ACCELERATE_MIXED_PRECISION")


def megatron_lm_options() -> dict[str, str]:
    """MEGATRON_LM_TP_DEGREE and the like, of Accelerate's launcher: {tp_degree: text}; those that are set to nothing
    are left out.
    """
    prefix = "MEGATRON_LM_"
    found = {name.removeprefix(prefix).lower(): text for name, text in os.environ.items() if name.startswith(prefix)}
    return {name: text for name, text in found.items() if text.lower() not in ("", "none")}


def accelerate_config_file() -> pathlib.Path:
    """Where `accelerate config` writes its YAML by default: below HF_HOME, or the user's cache."""
    user_cache = variable("XDG_CACHE_HOME") or "~/.cache"
    home = pathlib.Path(variable("HF_HOME") or pathlib.Path(user_cache) / "huggingface").expanduser()
    return home / "accelerate" / "default_config.yaml"


def threads() -> str | None:
    """OMP_NUM_THREADS: the threads of each process on the CPU, as text."""
    return variable("OMP_NUM_THREADS")


def one_thread_of_rensa() -> None:
    """Set RAYON_NUM_THREADS to 1 where it is not set: rensa starts a thread for each core when it is first used."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
