"""All that depends on the kind of device: its collective library, synchronisation and memory; no other module does."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megalith.common import environment as variables
from megalith.common.errors import ConfigError, problem
from megalith.config import environment
from megalith.config.flags.text import Words

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}


def pick_device(kind: str = "auto", local_rank: int | None = None) -> torch.device:
    """The device of this process.

    kind: auto, cpu, cuda or xpu. local_rank: rank among the processes of this machine (default: LOCAL_RANK).
    """
    present = torch.accelerator.current_accelerator(check_available=True)
    if kind == "auto":
        kind = present.type if present is not None else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if present is None or present.type != kind:
        found = present.type if present is not None else "no accelerator"
        raise ConfigError(
            f"--device {kind} must name a device of this machine; found {found}. Use --device auto or cpu."
        )
    if local_rank is None and variables.local_rank() is None and environment.world_size() > 1:
        rule = "must be set, as processes of one machine would otherwise share its first device"
        raise ConfigError(problem("The environment variable LOCAL_RANK", Words("nothing"), rule, environment.CURE))
    number = (variables.local_rank() or 0) if local_rank is None else local_rank
    count = torch.accelerator.device_count()
    if number >= count:
        raise ConfigError(
            f"Process {number} of this machine needs a {kind} device of its own; found {count}. "
            f"Start at most {count} processes here (--nproc-per-node)."
        )
    torch.accelerator.set_device_index(number)
    return torch.device(kind, number)


def backend_of(device: torch.device, requested: str | None = None) -> str:
    """The collective library of a device, or the requested one.

    Raises ConfigError where this torch is built without it, or it cannot serve the device.
    """
    name = requested or BACKENDS[device.type]
    found = name if requested else f"{name}, which the device {device.type} needs"
    if not dist.is_backend_available(name):
        available = ", ".join(each for each in BACKENDS.values() if dist.is_backend_available(each)) or "none"
        rule = f"must be a library that torch {torch.__version__} here is built with ({available})"
        cure = f"Leave the flag out, or install a torch with {name}" if requested else f"Install a torch with {name}"
        raise ConfigError(problem("--distributed-backend", found, rule, cure))
    if name != "gloo" and BACKENDS[device.type] != name:
        needed = BACKENDS[device.type]
        rule = f"must serve {device.type}, the device of this run, whose library is {needed}"
        raise ConfigError(problem("--distributed-backend", found, rule, f"Leave it out, or write {needed}"))
    return name


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on `device`; nothing to wait for on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device) -> int | None:
    """Largest number of bytes allocated on an accelerator so far; None on the CPU."""
    return None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)
