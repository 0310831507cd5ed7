"""The one place that maps a kind of device to what it needs: its collective library and its synchronisation."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megalith.common.errors import ConfigError, problem
from megalith.config import launched
from megalith.config.flags.text import Words

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}


def pick(kind: str = "auto", local_rank: int | None = None) -> torch.device:
    """The device of this process: `kind` is auto, cpu, cuda or xpu; local_rank counts the processes of one machine."""
    present = torch.accelerator.current_accelerator(check_available=True)
    if kind == "auto":
        kind = present.type if present is not None else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if present is None or present.type != kind:
        found = present.type if present is not None else "no accelerator"
        raise ConfigError(
            f"--device {kind}: found {found}; the device must be on this machine. Use --device auto or cpu."
        )
    if local_rank is None and "LOCAL_RANK" not in os.environ and launched.world_size() > 1:
        rule = "processes of one machine would share its first device"
        raise ConfigError(problem("environment variable LOCAL_RANK", Words("nothing"), rule, launched.CURE))
    number = int(os.environ.get("LOCAL_RANK", 0)) if local_rank is None else local_rank
    if number >= torch.accelerator.device_count():
        raise ConfigError(
            f"process {number} of this machine has no device of its own: found {torch.accelerator.device_count()} {kind} devices; "
            f"each process needs one. Start at most {torch.accelerator.device_count()} processes here (--nproc-per-node)."
        )
    torch.accelerator.set_device_index(number)
    return torch.device(kind, number)


def backend_of(device: torch.device, asked: str | None = None) -> str:
    """The collective library of a device, or the one asked for; ConfigError where this torch lacks it or it cannot serve the device."""
    name = asked or BACKENDS[device.type]
    found = name if asked else f"{name}, which the device {device.type} needs"
    if not dist.is_backend_available(name):
        there = ", ".join(each for each in BACKENDS.values() if dist.is_backend_available(each)) or "none"
        rule = f"torch {torch.__version__} here is built without it, and has {there}"
        cure = f"Leave the flag out, or install a torch with {name}" if asked else f"Install a torch with {name}"
        raise ConfigError(problem("--distributed-backend", found, rule, cure))
    if name != "gloo" and BACKENDS[device.type] != name:
        rule = f"it serves no {device.type}, the device of this run, whose library is {BACKENDS[device.type]}"
        raise ConfigError(
            problem("--distributed-backend", found, rule, f"Leave it out, or write {BACKENDS[device.type]}")
        )
    return name


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on `device`; nothing to wait for on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device) -> int | None:
    """Largest number of bytes allocated on an accelerator so far; None on the CPU."""
    return None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)
