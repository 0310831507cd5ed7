"""Sums over the processes of one machine in shared memory, for decoding on CPUs.

gloo takes some 400 us for the few KB that a decoding step sums after each attention and MLP, and there are a dozen such
sums in a step; here it is some 20 us. Each process writes its part and then a count. When it has seen the counts of
all, it adds the parts in the order of the ranks, so that all have the same bits. There are two sets of parts, used in
turns: who writes a sum's part has seen that all have finished the sum before the last.

It relies on other processes seeing writes in their order, which x86 promises, and has no gradient.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pathlib
import platform
import tempfile
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalith.common.errors import RankError

MEMORY = pathlib.Path("/dev/shm")
LIMIT = 1 << 20  # bytes of the largest part; what is larger takes gloo hardly longer than its bytes
LINE = 64  # bytes of a cache line: each count has one, so that no process slows another's
SECRET = 16  # bytes
SPINS = 1000  # looks at the counts before the core is left to others
PATIENCE = 600.0  # seconds until another process is taken for dead


class SharedMemorySum:
    """Sums of tensors on CPUs over a group of processes; see `shared_memory_sum`."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int):
        self.rank, self.size, self.turn = rank, size, 0
        self.counts = np.frombuffer(memory, np.int64, size * LINE // 8).reshape(size, -1)[:, 0]
        parts = np.frombuffer(memory, np.uint8, 2 * size * LIMIT, size * LINE)
        self.parts = torch.from_numpy(parts).view(2, size, LIMIT)

    def takes(self, x: Tensor) -> bool:
        """Whether x is small enough."""
        return x.nbytes <= LIMIT

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of x over the processes, all of which call with a tensor of the same shape and dtype."""
        self.turn += 1
        parts = self.parts[self.turn % 2, :, : x.nbytes].view(x.dtype).view(self.size, *x.shape)
        parts[self.rank].copy_(x)
        self.counts[self.rank] = self.turn
        self._wait()
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        return total

    def _wait(self) -> None:
        for _ in range(SPINS):
            if self.counts.min() >= self.turn:
                return
        end = time.monotonic() + PATIENCE
        while self.counts.min() < self.turn:
            os.sched_yield()
            if time.monotonic() > end:
                missing = [rank for rank, count in enumerate(self.counts) if count < self.turn]
                raise RankError(
                    f"Ranks {missing} of a tensor-parallel group have not taken part in a sum for {PATIENCE:g} s; they "
                    f"must run the same steps as this one. Look at their last messages, and start all again."
                )


def shared_memory_sum(ranks: Any, device: torch.device) -> SharedMemorySum | None:
    """Such sums over processes; None where they cannot be had: devices other than CPUs, processes of several machines.

    ranks: the processes, a checkpoint.ranks.Ranks. Each of them calls it.
    """
    if ranks.size == 1 or device.type != "cpu":
        return None
    made = ranks.on_rank_0(lambda: allocate(ranks.size * LINE + 2 * ranks.size * LIMIT))
    memory = None if made is None else attach(*made)
    complete = ranks.collect(lambda: memory is not None, all)
    if made is not None and ranks.rank == 0:
        os.unlink(made[0])  # the memory lives as long as it is mapped
    return SharedMemorySum(memory, ranks.rank, ranks.size) if complete else None


def allocate(size: int) -> tuple[str, bytes] | None:
    """A file of zeros in shared memory, with random bytes at its end that tell it from those of other machines."""
    if platform.machine() not in ("x86_64", "AMD64") or not MEMORY.is_dir():
        return None
    secret = os.urandom(SECRET)
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=MEMORY, delete=False) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # an error now, where there is no room, and none later
        except OSError:
            os.unlink(file.name)
            return None
        file.seek(size)
        file.write(secret)
        return file.name, secret
    return None


def attach(path: str, secret: bytes) -> mmap.mmap | None:
    """The memory of a file that ends with `secret`; None where this process does not see that file."""
    with contextlib.suppress(OSError), open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
        return memory if memory[-SECRET:] == secret else None
    return None
