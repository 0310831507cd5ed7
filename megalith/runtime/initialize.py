"""Initial weights by counter: element i of a parameter is f(seed, name, i), whichever rank draws it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megalith.layers import random


@torch.no_grad()
def initialize(
    model: nn.Module, seed: int, names: Mapping[str, str] | None = None, except_for: Collection[str] = ()
) -> None:  # fmt: skip
    """Fill every parameter as `model.initial(name)` says; each process draws only its own shard.

    names: from a pipeline stage's names of parameters to those in the whole model, where they differ.
    except_for: parameters that are left alone, by their names in the whole model.
    """
    for name, parameter in model.named_parameters():
        name = names.get(name, name) if names else name
        if name in except_for:
            continue
        kind, value = model.initial(name)
        fill(parameter, kind, value, random.key(seed, name))


def fill(parameter: Tensor, kind: str, value: float, key: int) -> None:
    """Fill one tensor or DTensor. kind: constant, normal (value: standard deviation), xavier, kaiming (value: gain)."""
    shape, offset = tuple(parameter.shape), (0,) * parameter.dim()
    local = parameter
    if isinstance(parameter, DTensor):
        _, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
        local = parameter.to_local()
    if kind == "constant":
        local.fill_(value)
        return
    if kind == "xavier":  # Glorot and Bengio, 2010: uniform in +- sqrt(6 / (fan in + fan out))
        limit = value * math.sqrt(6.0 / (shape[0] + shape[1]))
    elif kind == "kaiming":  # He et al., 2015, with the negative slope sqrt(5) that torch's and peft's layers take
        limit = value / math.sqrt(shape[1])
    flat = local.view(-1)
    for start in range(0, flat.numel(), random.CHUNK):
        part = flat[start : start + random.CHUNK]
        index = global_index(
            torch.arange(start, start + part.numel(), device=local.device), tuple(local.shape), offset, shape
        )
        if kind == "normal":
            part.copy_(random.normal(key, index).mul_(value))
        else:
            part.copy_(random.uniform(key, index).mul_(2.0 * limit).sub_(limit))


def global_index(flat: Tensor, local: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """From row-major indices `flat` in a shard of shape `local` at `offset` to those in the tensor of `shape`."""
    index, stride = torch.zeros_like(flat), 1
    for size, first, full_size in zip(reversed(local), reversed(offset), reversed(shape), strict=True):
        index += (flat % size + first) * stride
        flat, stride = flat // size, stride * full_size
    return index
