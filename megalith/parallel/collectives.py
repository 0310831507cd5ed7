"""Collectives along the tensor-parallel axis, with gradients, started and finished apart.

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
        self.size, self.rank, self.group = self.mesh.size(), self.mesh.get_local_rank(), self.mesh.get_group().group_name

    def check(self, length: int) -> None:
        """Raise ValueError where a sequence of this length cannot be split."""
        if self.sequence and length % self.size:
            raise ValueError(
                f"sequence length: found {length}; --sequence-parallel splits it among {self.size} ranks, which must divide it. "
                f"Pad the sequences, or evaluate inside `parallel.tensor.whole_sequences(model)`."
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


class Enter(torch.autograd.Function):
    """Into a split layer: the whole input forward, the sum of its gradients backward."""

    @staticmethod
    def forward(ctx, x: Tensor, size: int, group: str, sequence: bool) -> Tensor:
        ctx.size, ctx.group, ctx.sequence = size, group, sequence
        return finish_gather(start_gather(x, size, group), size) if sequence else x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        if ctx.sequence:
            return wait(start_scatter(gradient, ctx.size, ctx.group)), None, None, None
        return wait(start_sum(gradient, ctx.group)), None, None, None


class Leave(torch.autograd.Function):
    """Out of a split layer: the sum of the ranks' shares forward, the whole gradient backward."""

    @staticmethod
    def forward(ctx, x: Tensor, size: int, group: str, sequence: bool) -> Tensor:
        ctx.size, ctx.group, ctx.sequence = size, group, sequence
        return wait(start_scatter(x, size, group) if sequence else start_sum(x, group))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        if ctx.sequence:
            gradient = finish_gather(start_gather(gradient, ctx.size, ctx.group), ctx.size)
        return gradient, None, None, None


class Columns(torch.autograd.Function):
    """Several linear layers, split by rows of their weights, of one input.

    The input is gathered once. Backward, its gradient is on its way while those of the weights are computed; only the
    local part of the input is kept, and gathered again meanwhile, so that sequence parallelism divides this memory too.
    """

    @staticmethod
    def forward(ctx, x: Tensor, size: int, group: str, sequence: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """tensors: the weights [out/t, h], then as many biases [out/t] or None."""
        weights, biases = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        ctx.size, ctx.group, ctx.sequence = size, group, sequence
        ctx.save_for_backward(x, *weights)
        whole = finish_gather(start_gather(x, size, group), size) if sequence else x
        return tuple(torch.nn.functional.linear(whole, weight, bias) for weight, bias in zip(weights, biases))

    @staticmethod
    def backward(ctx, *gradients: Tensor):  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        trained = ctx.needs_input_grad[4:]
        gather = ctx.sequence and any(trained)
        whole = start_gather(x, ctx.size, ctx.group) if gather else x
        rows = [gradient.flatten(0, 1) for gradient in gradients]
        by_input = rows[0] @ weights[0]
        for row, weight in zip(rows[1:], weights[1:]):
            by_input = torch.addmm(by_input, row, weight)
        by_input = by_input.view(*gradients[0].shape[:2], -1)
        started = start_scatter(by_input, ctx.size, ctx.group) if ctx.sequence else start_sum(by_input, ctx.group)
        flat = (finish_gather(whole, ctx.size) if gather else whole).flatten(0, 1)
        by_weight = [row.t() @ flat if needed else None for row, needed in zip(rows, trained)]
        by_bias = [row.sum(dim=0) if needed else None for row, needed in zip(rows, trained[len(rows) :])]
        return wait(started), None, None, None, *by_weight, *by_bias
