"""The grid of processes, as one value that is passed by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import sys
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megalith.common.errors import ConfigError, RankError
from megalith.config import launched
from megalith.config.sections.parallel import ParallelConfig
from megalith.parallel.devices import backend_of, pick

SILENCE = 20.0  # seconds of waiting for others before that is said
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # tp varies fastest, as in Megatron's rank order


@dataclasses.dataclass(frozen=True)
class Mesh:
    """This process's place in the grid. Axes: pp, dp_replicate, dp_shard, cp, tp."""

    device: torch.device
    devices: DeviceMesh

    @property
    def rank(self) -> int:
        """Global number of this process."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.devices.size()

    def size(self, axis: str) -> int:
        """Processes along an axis."""
        return self.devices.size(AXES.index(axis))

    def place(self, axis: str) -> int:
        """Number of this process along an axis."""
        return self.devices.get_local_rank(axis)

    @property
    def data_size(self) -> int:
        """Data-parallel processes: those that read different samples."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def data_rank(self) -> int:
        """Number of this process among the data-parallel ones."""
        return self.place("dp_replicate") * self.size("dp_shard") + self.place("dp_shard")

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def flat(self, *axes: str) -> DeviceMesh:
        """Several neighbouring axes as one."""
        return self.devices[axes]._flatten("_".join(axes)) if len(axes) > 1 else self.devices[axes[0]]

    def share(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over the processes that read different tokens (data-parallel and context-parallel), in place."""
        if self.data_size * self.size("cp") > 1:
            dist.all_reduce(values, group=self.flat("dp_replicate", "dp_shard", "cp").get_group())
        return values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [...] of the processes that read different tokens, [data-parallel x context-parallel, ...], cp fastest."""
        size = self.data_size * self.size("cp")
        gathered = values.new_empty((size, *values.shape))
        if size == 1:
            return gathered.copy_(values[None])
        group = self.flat("dp_replicate", "dp_shard", "cp").get_group()
        dist.all_gather_into_tensor(gathered.flatten(0, 1), values.contiguous(), group=group)
        return gathered


def start(config: ParallelConfig) -> Mesh:
    """Join the process group, and make the mesh over it."""
    return grid(config, join(config))


def join(config: ParallelConfig) -> torch.device:
    """Join the process group that the launcher's variables describe (torchrun's; none of them means one process).

    A group that the caller has made is used as it is. Returns this process's device.
    Raises ConfigError where the variables are wrong, RankError where the processes do not meet.
    """
    if not dist.is_initialized():
        launched.check_connection()
    device = pick(config.device)
    if not dist.is_initialized():
        backend = backend_of(device, config.distributed_backend)
        timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
        if launched.world_size() > 1:
            with _meeting(config):
                dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    return device


@contextlib.contextmanager
def _meeting(config: ParallelConfig) -> Iterator[None]:
    """Around the wait for the other processes: a line where it takes long, and an error where they do not come."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    who = f"rank {launched.rank()} of {launched.world_size()}"
    rule = "Each process is started once, with a RANK of its own and the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
    line = (
        f"megalith: {who} has waited {SILENCE:g} s at {place} for the others, and goes on waiting for up to "
        f"--distributed-timeout-minutes {config.distributed_timeout_minutes:g}. {rule}."
    )
    timer = threading.Timer(SILENCE, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise RankError(f"{who} did not meet the others at {place}. {rule}. ({first_line})") from error
    finally:
        timer.cancel()


def grid(config: ParallelConfig, device: torch.device) -> Mesh:
    """The mesh of the degrees in `config` over the whole process group."""
    world = dist.get_world_size()
    fixed = config.model_parallel_size * config.data_parallel_replicas
    if world % fixed:
        raise ConfigError(
            f"{world} processes do not divide into tensor {config.tensor_model_parallel_size} "
            f"x pipeline {config.pipeline_model_parallel_size} x context {config.context_parallel_size} "
            f"x replicas {config.data_parallel_replicas}; their product must divide the number of processes. "
            f"Start a multiple of {fixed} processes, or lower --tensor-model-parallel-size or its like."
        )
    data = world // config.model_parallel_size
    # Without sharding every data-parallel process is a replica; with it, those of one replica group share one copy.
    replicate = data if config.sharding == "none" else config.data_parallel_replicas
    shape = (
        config.pipeline_model_parallel_size,
        replicate,
        data // replicate,
        config.context_parallel_size,
        config.tensor_model_parallel_size,
    )
    return Mesh(device, dist.init_device_mesh(device.type, shape, mesh_dim_names=AXES))
