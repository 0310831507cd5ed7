"""Parameters on the tensor-parallel axis, and the sums of their gradients.

Every parameter, replicated ones too, is a DTensor on the one axis: optimizers and clipping then see one kind, and a
checkpoint sees true shapes. Compute is on local tensors. A dimension that does not divide is split as DTensor does:
the last ranks hold less, nothing is padded. `partial_gradients` of a module names its parameters of which each
rank computes a part of the gradient (DTensor's Partial).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from megalith.parallel.collectives import Axis, start_sum, wait

BUCKET = 1 << 24  # elements of gradients that are summed in one call


def to_local(parameter):
    """The plain tensor that this rank holds of a parameter; None of None."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def shard_range(size: int, axis: Axis) -> tuple[int, int]:
    """(first, number) of this rank's rows of `size` rows."""
    step = -(-size // axis.size)
    first = min(step * axis.rank, size)
    return first, min(step, size - first)


def distribute(parameter: Tensor, axis: Axis, dim: int | None) -> nn.Parameter:
    """The parameter as a DTensor on the axis: split along `dim`, or replicated where None. Each rank cuts its own."""
    part, data = parameter.detach(), parameter.detach()
    if dim is not None:
        part = data.narrow(dim, *shard_range(data.shape[dim], axis)).contiguous()
    placement = Replicate() if dim is None else Shard(dim)
    found = DTensor.from_local(part, axis.mesh, [placement], run_check=False, shape=data.shape, stride=data.stride())
    return nn.Parameter(found, requires_grad=parameter.requires_grad)


@torch.no_grad()
def sum_gradients(model: nn.Module) -> None:
    """Sum `partial_gradients` over the tensor-parallel ranks; once a step, after all others' sums."""
    axis, seen, pending = None, set[int](), dict[torch.dtype, list[Tensor]]()
    for module in model.modules():
        for name in getattr(module, "partial_gradients", ()):
            parameter = getattr(module, name)
            if parameter is not None and parameter.grad is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                axis = axis or module.axis
                pending.setdefault(parameter.grad.dtype, []).append(to_local(parameter.grad))
    for gradients in pending.values():
        for bucket in buckets(gradients, BUCKET):
            flat = wait(start_sum(torch.cat([gradient.flatten() for gradient in bucket]), axis.group))
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view(gradient.shape) for part, gradient in zip(parts, bucket)])


def buckets(tensors: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of about `limit` elements."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(held.numel() for held in bucket) >= limit:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
