"""Collectives along the tensor-parallel axis that are started and waited for separately (with gradients: mappings.py).

They are torch's functional collectives, which compile with fullgraph. The result of a started one must not be read
before `wait`. torch.distributed.nn.functional.all_gather is not used: its gradients were wrong under gloo.
Shapes: b batch, s sequence, h hidden, t ranks of the axis.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megalith.parallel.shared_memory import SharedMemorySum

ops = torch.ops._c10d_functional
wait = ops.wait_tensor


@dataclasses.dataclass
class Axis:
    """The tensor-parallel (or context-parallel) axis as one process sees it.

    sequence_parallel: whether activations between the split layers are sharded along the sequence (rank r holds
        shard r).
    shared_memory: sums of small tensors without gradient; None where they are not in use.
    """

    mesh: DeviceMesh
    sequence_parallel: bool = False
    shared_memory: SharedMemorySum | None = None

    def __post_init__(self):
        self.size, self.rank, self.group = (
            self.mesh.size(),
            self.mesh.get_local_rank(),
            self.mesh.get_group().group_name,
        )

    def check_length(self, length: int) -> None:
        """Raise ValueError where a sequence of this length cannot be split."""
        if self.sequence_parallel and length % self.size:
            raise ValueError(
                f"The sequence length must be divisible by the {self.size} ranks among which --sequence-parallel "
                f"splits it; found {length}. Pad the sequences, or evaluate inside "
                f"`parallel.sequence.unsharded_sequences(model)`."
            )

    def sequence_shard(self, x: Tensor) -> Tensor:
        """This rank's shard of the sequence of x [b, s, ...]; x itself without sequence parallelism."""
        if not self.sequence_parallel:
            return x
        self.check_length(x.shape[1])
        length = x.shape[1] // self.size
        return x.narrow(1, self.rank * length, length)


def start_all_reduce(x: Tensor, group: str) -> Tensor:
    """Start summing x over the ranks."""
    return ops.all_reduce(x.contiguous(), "sum", group)


def start_all_reduce_max(x: Tensor, group: str) -> Tensor:
    """Start taking the maximum of each element over the ranks."""
    return ops.all_reduce(x.contiguous(), "max", group)


def start_all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """Start gathering [b, s/t, h] of all ranks; `finish_all_gather` finishes it."""
    return ops.all_gather_into_tensor(x.contiguous(), size, group)


def finish_all_gather(started: Tensor, size: int) -> Tensor:
    """The gathered [b, s, h]; a copy where b > 1."""
    shards = wait(started)
    return shards.view(size, -1, *shards.shape[1:]).transpose(0, 1).flatten(1, 2)


def start_reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """Start summing x [b, s, h] over the ranks; each gets its shard [b, s/t, h] of the sum."""
    shards = x.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
    return ops.reduce_scatter_tensor(shards.contiguous(), "sum", size, group)


def gather_last_dim(x: Tensor, size: int, group: str) -> Tensor:
    """Concatenate x of all ranks along the last dimension, [..., n] -> [..., n x t]."""
    shards = wait(ops.all_gather_into_tensor(x.contiguous()[None], size, group))
    return shards.movedim(0, -2).flatten(-2)
