"""Parameters on the tensor-parallel axis, and the sums of their gradients.

Every parameter, replicated ones too, is a DTensor on this axis: optimizers and clipping then see one kind, and a
checkpoint sees global shapes. Compute is on local tensors. A dimension that does not divide is split as DTensor does:
the last ranks hold less, nothing is padded. `partial_gradients` of a module names its parameters whose gradient is
the sum of what the ranks compute (DTensor's Partial).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from megalith.parallel.collectives import Axis, start_all_reduce, wait

BUCKET = 1 << 24  # elements of gradients that are summed in one call


def to_local(parameter):
    """The local tensor of a DTensor; anything else, None too, as it is."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def shard_range(size: int, axis: Axis) -> tuple[int, int]:
    """(first, number) of this rank's rows out of `size` rows."""
    step = -(-size // axis.size)
    first = min(step * axis.rank, size)
    return first, min(step, size - first)


def distribute(parameter: Tensor, axis: Axis, dim: int | None) -> nn.Parameter:
    """The parameter as a DTensor on the axis, split along `dim`, or replicated where `dim` is None.

    Each rank takes its own shard; nothing is sent.
    """
    local, data = parameter.detach(), parameter.detach()
    if dim is not None:
        local = data.narrow(dim, *shard_range(data.shape[dim], axis)).contiguous()
    placement = Replicate() if dim is None else Shard(dim)
    dtensor = DTensor.from_local(local, axis.mesh, [placement], run_check=False, shape=data.shape, stride=data.stride())
    return nn.Parameter(dtensor, requires_grad=parameter.requires_grad)


@torch.no_grad()
def sum_partial_gradients(model: nn.Module) -> None:
    """Sum `partial_gradients` over the tensor-parallel ranks; once a step, after the sums over data-parallel ranks."""
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
            flat = wait(start_all_reduce(torch.cat([gradient.flatten() for gradient in bucket]), axis.group))
            sums = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [total.view(gradient.shape) for total, gradient in zip(sums, bucket)])


def buckets(tensors: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of about `limit` elements."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(each.numel() for each in bucket) >= limit:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
