"""The norm of all gradients, however they are sharded, and clipping by it.

Tensors come as (name, tensor) pairs; a tensor may be a DTensor. Every element of the model is counted once, with one
all-reduce of one number: a piece is held by (ranks / pieces) ranks, so each of them adds that fraction of its sum.
The pieces of a tensor are the shards of its placements times `stages`, because a DTensor knows nothing of pipeline
stages, each of which has tensors of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

NamedTensors = Sequence[tuple[str, torch.Tensor]]

# torch's float32 norm on a CPU adds in a few long chains: the norm of 60 million normal numbers comes out 0.5 % too
# small, and the error depends on the sharding. Pieces of this many elements keep the error to 2e-8 and cost 1.6 times
# the time (float64 throughout: 27 times).
_CPU_PIECE = 1 << 14


def gradients(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> list[tuple[str, torch.Tensor]]:
    """The (name, gradient) pairs of the parameters that have a gradient."""
    return [(name, parameter.grad) for name, parameter in named_parameters if parameter.grad is not None]


@torch.no_grad()
def global_norm(
    tensors: NamedTensors, *, not_owned: Collection[int] = (), stages: int = 1, group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:  # fmt: skip
    """L2 norm over the whole model: a 0-dimensional tensor on the tensors' device, equal on all ranks.

    Nothing here waits for the device. Every rank of `group` must call.
    not_owned: positions in `tensors` of those that another stage owns (the second copy of a tied embedding) and counts.
    stages: number of pipeline stages. group: the ranks that hold the model (default: all). device: of the norm where
        there are no tensors on this rank.
    Tensors that are not DTensors are taken to be equal on all ranks of a stage. The norm is infinite or NaN if any
    element is.
    """
    counted = _owned(tensors, not_owned)
    squares = _square_sums([_local(tensor) for _, tensor in counted])
    where = _device(tensors) if tensors or device is None else device
    return _sum_over_ranks(counted, squares, where, stages, group).sqrt()


@torch.no_grad()
def clip(
    grads: NamedTensors,
    max_norm: float,
    *,
    inverse_scale: float = 1.0,
    not_owned: Collection[int] = (),
    stages: int = 1,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Multiply the gradients in place so that their global norm is at most `max_norm`; return the norm before that.

    The factor is max_norm / (norm + 1e-6) where that is below 1, as in Megatron. `max_norm` 0 leaves gradients alone.
    inverse_scale: 1 / loss scale. The same pass multiplies the gradients by it; the norm is that of gradients without
        the loss scale.
    An overflow shows in the norm (not finite, on every rank), so fp16 needs no check and no all-reduce of its own. The
    gradients are then useless: skip the step. `not_owned` applies to the norm; all of `grads` are multiplied.
    """
    norm = global_norm(grads, not_owned=not_owned, stages=stages, group=group, device=device) * inverse_scale
    if grads and (max_norm > 0.0 or inverse_scale != 1.0):
        factor = (
            torch.clamp(max_norm / (norm + 1e-6), max=1.0) * inverse_scale
            if max_norm > 0.0
            else norm.new_tensor(inverse_scale)
        )
        torch._foreach_mul_([_local(grad) for _, grad in grads], factor.to(_local(grads[0][1]).dtype))
    return norm


@torch.no_grad()
def count_zeros(
    grads: NamedTensors, *, not_owned: Collection[int] = (), stages: int = 1, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """How many gradient elements of the whole model are exactly zero; the arguments are those of `global_norm`."""
    counted = _owned(grads, not_owned)
    zeros = [_local(tensor).numel() - torch.count_nonzero(_local(tensor)) for _, tensor in counted]
    return _sum_over_ranks(counted, zeros, _device(grads), stages, group)


def _owned(tensors: NamedTensors, not_owned: Collection[int]) -> NamedTensors:
    return [pair for position, pair in enumerate(tensors) if position not in not_owned]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _device(tensors: NamedTensors) -> torch.device:
    return tensors[0][1].device if tensors else torch.device("cpu")


def _square_sums(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Sum of squares of each local tensor, added in float32 (in float64 where a tensor is)."""
    if not tensors:
        return []
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, 2, dtype)).square().unbind()
    pieces = (tensor.reshape(-1).split(_CPU_PIECE) for tensor in tensors)
    return [torch.stack(torch._foreach_norm(piece, 2, dtype)).double().square().sum() for piece in pieces]


def _pieces(tensor: torch.Tensor, stages: int, ranks: int) -> int:
    """Into how many different pieces `ranks` ranks divide this tensor and the corresponding ones of other stages."""
    pieces = stages
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            assert not placement.is_partial(), "a gradient must be reduced before its norm is taken"
            pieces *= 1 if placement.is_replicate() else tensor.device_mesh.size(axis)
    assert ranks % pieces == 0, (
        f"{ranks} ranks cannot hold {pieces} pieces of a tensor; `group` must be all ranks that hold the model"
    )
    return pieces


def _sum_over_ranks(
    tensors: NamedTensors, values: Sequence[torch.Tensor], device: torch.device, stages: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:  # fmt: skip
    """Sum of one number per tensor over all its pieces, each counted once.

    That takes one all-reduce, or none where all ranks hold the same.
    """
    dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32  # others may lack float64
    distributed = stages > 1 or group is not None or any(isinstance(tensor, DTensor) for _, tensor in tensors)
    ranks = dist.get_world_size(group) if distributed and dist.is_initialized() else 1
    if not values:
        total = torch.zeros((), dtype=dtype, device=device)
    else:
        fractions = [_pieces(tensor, stages, ranks) / ranks for _, tensor in tensors]
        total = torch.dot(torch.stack(list(values)).to(dtype), torch.tensor(fractions, dtype=dtype, device=device))
    if ranks > 1:
        dist.all_reduce(total, group=group)
    return total
