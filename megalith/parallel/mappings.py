"""Into tensor-parallel regions and out of them: Megatron's mappings, with their gradients.

Shoeybi et al., 2019 (arXiv 1909.08053), figure 3: copy is f, reduce is g. Korthikanti et al., 2022 (arXiv 2205.05198),
figure 5: gather and reduce-scatter of the sequence. Shapes: b batch, s sequence, h hidden, t ranks of the axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalith.parallel.collectives import (
    Axis,
    finish_gather,
    gather_columns,
    start_gather,
    start_scatter,
    start_sum,
    wait,
)


def copy_to_tensor_model_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """[b, s, h] as it is, its gradient summed; under sequence parallelism `gather_from_sequence_parallel_region`."""
    return gather_from_sequence_parallel_region(x, axis) if axis.sequence else _Copy.apply(x, axis.group)


def reduce_from_tensor_model_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """[b, s, h] summed, its gradient as it is; under sequence parallelism reduce-scattered to [b, s/t, h]."""
    return _ReduceScatter.apply(x, axis.size, axis.group) if axis.sequence else _Reduce.apply(x, axis.group)


def gather_from_tensor_model_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """Columns [..., n] joined, [..., n t]. What follows is alike on all ranks: each has its part of the gradient."""
    return _GatherColumns.apply(x, axis.size, axis.rank, axis.group)


def gather_from_sequence_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """Parts [b, s/t, h] of the sequence joined, [b, s, h]; the gradient is reduce-scattered."""
    return _GatherSequence.apply(x, axis.size, axis.group)


def broadcast_from_first_rank(x: Tensor, axis: Axis) -> Tensor:
    """Rank 0's tensor on all. What follows is the same on all ranks, so its gradient is that of rank 0."""
    return _Broadcast.apply(x, axis.rank == 0, axis.group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return wait(start_sum(gradient, ctx.group)), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: str) -> Tensor:
        return wait(start_sum(x, group))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return finish_gather(start_gather(x, size, group), size)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return wait(start_scatter(gradient, ctx.size, ctx.group)), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return wait(start_scatter(x, size, group))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return finish_gather(start_gather(gradient, ctx.size, ctx.group), ctx.size), None, None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, size: int, rank: int, group: str) -> Tensor:
        ctx.first, ctx.number = x.shape[-1] * rank, x.shape[-1]
        return gather_columns(x, size, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient.narrow(-1, ctx.first, ctx.number).contiguous(), None, None, None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mine: bool, group: str) -> Tensor:
        ctx.mine = mine
        return wait(start_sum(x if mine else torch.zeros_like(x), group))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient if ctx.mine else torch.zeros_like(gradient), None, None
