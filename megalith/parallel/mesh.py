"""The device mesh of all processes, as one value that functions pass on; nothing here is global."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import sys
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megalith.common import environment as variables
from megalith.common.errors import ConfigError, RankError
from megalith.config import environment
from megalith.config.sections.parallel import ParallelConfig
from megalith.parallel.collectives import ops, wait
from megalith.parallel.devices import backend_of, pick_device

NOTICE_AFTER = 20.0  # seconds of waiting for other processes before a line says so
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # tp varies fastest, as in Megatron's rank order


@dataclasses.dataclass(frozen=True)
class Mesh:
    """torch's DeviceMesh as this process sees it. Axes: pp, dp_replicate, dp_shard, cp, tp."""

    device: torch.device
    device_mesh: DeviceMesh

    @property
    def global_rank(self) -> int:
        """Rank of this process among all processes."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.device_mesh.size()

    def size(self, axis: str) -> int:
        """Processes along an axis."""
        return self.device_mesh.size(AXES.index(axis))

    def rank(self, axis: str) -> int:
        """Rank of this process along an axis."""
        return self.device_mesh.get_local_rank(axis)

    @property
    def data_size(self) -> int:
        """Data-parallel processes: those that read different samples."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def data_rank(self) -> int:
        """Rank of this process among the data-parallel ones."""
        return self.rank("dp_replicate") * self.size("dp_shard") + self.rank("dp_shard")

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes the run's files and log lines."""
        return self.global_rank == 0

    def flat(self, *axes: str) -> DeviceMesh:
        """Several neighbouring axes, flattened to one."""
        return self.device_mesh[axes]._flatten("_".join(axes)) if len(axes) > 1 else self.device_mesh[axes[0]]

    @functools.cached_property
    def model_group(self) -> dist.ProcessGroup:
        """The processes that hold a model together and read the same samples (axes pp, cp and tp), over gloo.

        All of them call it at its first use.
        """
        ranks = self.device_mesh.mesh.reshape(self.size("pp"), self.data_size, -1)[:, self.data_rank].flatten().tolist()
        return dist.new_group(ranks, backend="gloo", use_local_synchronization=len(ranks) < self.world_size)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over the processes that read different tokens (axes dp and cp), in place."""
        if self.data_size * self.size("cp") > 1:
            dist.all_reduce(values, group=self.flat("dp_replicate", "dp_shard", "cp").get_group())
        return values

    def gather_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [...] of all processes that read different tokens: [dp x cp, ...], where cp varies fastest."""
        size = self.data_size * self.size("cp")
        if size == 1:
            return values[None].clone()
        group = self.flat("dp_replicate", "dp_shard", "cp").get_group().group_name
        return wait(ops.all_gather_into_tensor(values.contiguous()[None], size, group))

    def broadcast(self, values: torch.Tensor, axis: str, source: int) -> torch.Tensor:
        """`values` of rank `source` along an axis, on every process of it, in place."""
        if self.size(axis) > 1:
            dist.broadcast(values, group=self.device_mesh.get_group(axis), group_src=source)
        return values

    def maximum(self, value: int, axis: str) -> int:
        """The largest `value` of the processes along an axis."""
        values = torch.tensor(value, device=self.device)
        if self.size(axis) > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.device_mesh.get_group(axis))
        return int(values)

    def exchange_over_data(self, message: bytes, expected: int) -> list[bytes]:
        """The messages of all processes that read different tokens, in the order of `gather_over_data`.

        expected: bytes within which messages usually are; one collective then, otherwise two.
        """
        data, width = len(message).to_bytes(8, "little") + message, expected + 8
        while True:
            padded = torch.frombuffer(bytearray(data[:width].ljust(width, b"\0")), dtype=torch.uint8)
            rows = [row.numpy().tobytes() for row in self.gather_over_data(padded.to(self.device)).cpu()]
            sizes = [8 + int.from_bytes(row[:8], "little") for row in rows]
            if max(sizes) <= width:
                return [row[8:size] for row, size in zip(rows, sizes)]
            width = max(sizes)


def init_mesh(config: ParallelConfig) -> Mesh:
    """Initialize the process group, and build the mesh over it."""
    return build_mesh(config, init_distributed(config))


def init_distributed(config: ParallelConfig) -> torch.device:
    """Initialize the process group from the launcher's environment variables. Returns this process's device.

    The variables are those of torchrun; without them there is one process. A group that the caller has initialized is
    used as it is.
    Raises ConfigError where the variables are wrong, RankError where the processes do not meet.
    """
    if not dist.is_initialized():
        environment.check_connection()
    device = pick_device(config.device)
    if not dist.is_initialized():
        backend = backend_of(device, config.distributed_backend)
        timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
        if environment.world_size() > 1:
            with _waiting_for_others(config):
                dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    return device


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A process group that begins within the block ends with it."""
    owned = not dist.is_initialized()
    try:
        yield
    finally:
        if owned and dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _waiting_for_others(config: ParallelConfig) -> Iterator[None]:
    """Around the wait for the other processes: print a line where it takes long, raise RankError where they fail."""
    address = f"{variables.main_address()}:{variables.main_port()}"
    who = f"rank {environment.rank()} of {environment.world_size()}"
    rule = "Each process is started once, with a RANK of its own and the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
    line = (
        f"megalith: {who} has waited {NOTICE_AFTER:g} s at {address} for the others, and keeps waiting "
        f"for up to {config.distributed_timeout_minutes:g} minutes (--distributed-timeout-minutes). {rule}."
    )
    timer = threading.Timer(NOTICE_AFTER, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise RankError(f"{who} did not meet the others at {address}. {rule}. ({first_line})") from error
    finally:
        timer.cancel()


def build_mesh(config: ParallelConfig, device: torch.device) -> Mesh:
    """The mesh over the whole process group, with the parallel sizes of `config`."""
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
