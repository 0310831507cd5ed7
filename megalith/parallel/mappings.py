"""Collectives into and out of tensor-parallel regions, with their gradients: Megatron's mappings.py.

Shoeybi et al., 2019 (arXiv 1909.08053), figure 3: copy is f, reduce is g. Korthikanti et al., 2022 (arXiv 2205.05198),
figure 5: gather and reduce-scatter of the sequence. Unlike Megatron's, copy and reduce become those by themselves where
the axis has sequence parallelism. All are waited for at once; column-parallel layers, whose backward collectives
overlap products, have their own (matmul.py). Shapes: b batch, s sequence, h hidden, t ranks of the axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalith.parallel.collectives import (
    Axis,
    finish_all_gather,
    gather_last_dim,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)


def copy_to_tensor_model_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """[b, s, h] unchanged, its gradient all-reduced; under sequence parallelism shards [b, s/t, h] are gathered.

    The latter is `gather_from_sequence_parallel_region`.
    """
    return gather_from_sequence_parallel_region(x, axis) if axis.sequence_parallel else _Copy.apply(x, axis.group)


def reduce_from_tensor_model_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """[b, s, h] all-reduced, its gradient unchanged; under sequence parallelism reduce-scattered to [b, s/t, h].

    The gradient of the latter is all-gathered to [b, s, h].
    """
    shared = axis.shared_memory
    if shared is not None and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or axis.sequence_parallel):
        return shared(x) if shared.takes(x) else _Reduce.apply(x, axis.group)
    return _ReduceScatter.apply(x, axis.size, axis.group) if axis.sequence_parallel else _Reduce.apply(x, axis.group)


def gather_from_tensor_model_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """[..., n] of all ranks, concatenated to [..., n x t].

    All ranks compute the same from it, so each takes its own n of the gradient, without a collective.
    """
    return _GatherLastDim.apply(x, axis.size, axis.rank, axis.group)


def gather_from_sequence_parallel_region(x: Tensor, axis: Axis) -> Tensor:
    """Shards [b, s/t, h] of the sequence, gathered to [b, s, h]; the gradient is reduce-scattered.

    It gathers whether or not `axis.sequence_parallel` is set (context.py uses it too).
    """
    return _GatherSequence.apply(x, axis.size, axis.group)


def broadcast_from_first_rank(x: Tensor, axis: Axis) -> Tensor:
    """Rank 0's x on all ranks, by an all-reduce in which the others add zeros.

    All ranks compute the same from it, so rank 0 takes its own gradient, the others zeros, without a collective.
    """
    return _Broadcast.apply(x, axis.rank == 0, axis.group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return wait(start_all_reduce(gradient, ctx.group)), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: str) -> Tensor:
        return wait(start_all_reduce(x, group))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return finish_all_gather(start_all_gather(x, size, group), size)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return wait(start_reduce_scatter(gradient, ctx.size, ctx.group)), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return wait(start_reduce_scatter(x, size, group))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return finish_all_gather(start_all_gather(gradient, ctx.size, ctx.group), ctx.size), None, None


class _GatherLastDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, size: int, rank: int, group: str) -> Tensor:
        ctx.first, ctx.number = x.shape[-1] * rank, x.shape[-1]
        return gather_last_dim(x, size, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient.narrow(-1, ctx.first, ctx.number).contiguous(), None, None, None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, is_source: bool, group: str) -> Tensor:
        ctx.is_source = is_source
        return wait(start_all_reduce(x if is_source else torch.zeros_like(x), group))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient if ctx.is_source else torch.zeros_like(gradient), None, None
