"""Collectives along the tensor-parallel axis, started and finished apart (mappings.py has those with gradients).

They are torch's functional collectives, which compile with fullgraph. Of a started one the result is not there before
`wait`. torch.distributed.nn.functional.all_gather is not used: its gradients were wrong under gloo.
Shapes: b batch, s sequence, h hidden, t ranks of the axis.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

ops = torch.ops._c10d_functional
wait = ops.wait_tensor


@dataclasses.dataclass
class Axis:
    """The tensor-parallel axis as one process sees it.

    sequence: whether activations between the split layers are split along the sequence (rank r holds the r-th part).
    """

    mesh: DeviceMesh
    sequence: bool = False

    def __post_init__(self):
        self.size, self.rank, self.group = (
            self.mesh.size(),
            self.mesh.get_local_rank(),
            self.mesh.get_group().group_name,
        )

    def check(self, length: int) -> None:
        """Raise ValueError where a sequence of this length cannot be split."""
        if self.sequence and length % self.size:
            raise ValueError(
                f"sequence length: found {length}; --sequence-parallel splits it among {self.size} ranks, which must divide it. "
                f"Pad the sequences, or evaluate inside `parallel.sequence.whole_sequences(model)`."
            )

    def part(self, x: Tensor) -> Tensor:
        """This rank's part of the sequence of x [b, s, ...]; all of it where sequences are whole."""
        if not self.sequence:
            return x
        self.check(x.shape[1])
        length = x.shape[1] // self.size
        return x.narrow(1, self.rank * length, length)


def start_sum(x: Tensor, group: str) -> Tensor:
    """Start summing x over the ranks."""
    return ops.all_reduce(x.contiguous(), "sum", group)


def start_maximum(x: Tensor, group: str) -> Tensor:
    """Start taking the largest of each element over the ranks."""
    return ops.all_reduce(x.contiguous(), "max", group)


def start_gather(x: Tensor, size: int, group: str) -> Tensor:
    """Start joining [b, s/t, h] of all ranks; for `finish_gather`."""
    return ops.all_gather_into_tensor(x.contiguous(), size, group)


def finish_gather(started: Tensor, size: int) -> Tensor:
    """The joined [b, s, h]; a copy where b > 1."""
    parts = wait(started)
    return parts.view(size, -1, *parts.shape[1:]).transpose(0, 1).flatten(1, 2)


def start_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """Start summing x [b, s, h] over the ranks, of which each gets its part [b, s/t, h]."""
    parts = x.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
    return ops.reduce_scatter_tensor(parts.contiguous(), "sum", size, group)


def gather_columns(x: Tensor, size: int, group: str) -> Tensor:
    """Join the last dimension of all ranks, [..., n] -> [..., n x t]."""
    parts = wait(ops.all_gather_into_tensor(x.contiguous()[None], size, group))
    return parts.movedim(0, -2).flatten(-2)
