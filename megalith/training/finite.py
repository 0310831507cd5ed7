"""Weights and optimizer state that are no longer numbers: never saved, never gone on from. Every rank comes to one answer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megalith import checkpoint
from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store.folder import iteration_of, paths
from megalith.common.errors import CheckpointError, TrainingError, problem
from megalith.config.flags.text import Words

# A weight too large to be squared in float32 has diverged as surely as an infinite one: no norm of it exists.
LARGEST = math.sqrt(torch.finfo(torch.float32).max)
RULE = (
    f"weights and optimizer state are finite numbers, weights below {LARGEST:.1e}; what has them otherwise has diverged"
)


def check_before_saving(parts: Iterable[Mapping[str, Tensor]], iteration: int, again: Callable[[], str]) -> None:
    """Raise TrainingError on all ranks where what is to be saved is not finite. again: what the next start does."""
    if names := broken(parts):
        cure = f"Nothing was saved or deleted for it; go on with a lower --lr (and --override-opt-param-scheduler): {again()}"
        raise TrainingError(problem(f"step {iteration}", Words(some(names)), RULE, cure))


def check_loaded(parts: Iterable[Mapping[str, Tensor]], source: str | os.PathLike, iteration: int) -> None:
    """Raise CheckpointError on all ranks where what was loaded from `source` is not finite; it names the newest one that is."""
    if names := broken(parts):
        good = Ranks().first(lambda: newest_finite(source))
        cure = (
            f"Give --ckpt-step {good}, the newest that is finite"
            if good is not None
            else "No other there is finite; start anew"
        )
        raise CheckpointError(problem(f"{source}, iteration {iteration}", Words(some(names)), RULE, cure))


def broken(parts: Iterable[Mapping[str, Tensor]]) -> list[str]:
    """The names of tensors that are not finite on any rank, sorted, on every rank. All ranks call it."""
    mine = [name for tensors in parts for name in not_finite(tensors)]
    return Ranks().collect(lambda: mine, lambda each: sorted({name for names in each for name in names}))


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that break RULE in what this rank holds of them."""
    local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    largest = {
        name: float(torch.linalg.vector_norm(tensor.float(), math.inf))
        for name, tensor in local.items()
        if tensor.numel()
    }
    # nan, which the norm is where any element is, is below nothing
    return [name for name, value in largest.items() if not value < (LARGEST if name.startswith("model/") else math.inf)]


def newest_finite(folder: str | os.PathLike) -> int | None:
    """The newest undamaged iteration in `folder` that is finite; reads it, a tensor at a time."""
    for path in reversed(paths(folder)):
        if not checkpoint.verify(path) and not any(
            not_finite({name: tensor}) for name, tensor in checkpoint.read_tensors(path)
        ):
            return iteration_of(path)
    return None


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
