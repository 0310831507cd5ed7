"""Weights and optimizer state that are not finite: never saved, never resumed from. All ranks get the same answer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megalith import checkpoint
from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store.folder import checkpoint_paths, iteration_of
from megalith.common.errors import CheckpointError, TrainingError, problem
from megalith.config.flags.text import Words

# A weight too large to be squared in float32 has diverged as surely as an infinite one: no norm of it exists.
MAX_WEIGHT = math.sqrt(torch.finfo(torch.float32).max)
STATE = "weights and optimizer state"
RULE = f"must be finite numbers, and weights below {MAX_WEIGHT:.1e}, or the run has diverged"


def check_before_saving(parts: Iterable[Mapping[str, Tensor]], iteration: int, next_start: Callable[[], str]) -> None:
    """Raise TrainingError on all ranks where what is to be saved is not finite.

    next_start: what the next start does, as text.
    """
    if names := find_not_finite(parts):
        retry = "resume with a lower --lr (and --override-opt-param-scheduler)"
        cure = f"Nothing was saved or deleted since; {retry}: {next_start()}"
        raise TrainingError(problem(f"Step {iteration}: {STATE}", Words(abbreviate(names)), RULE, cure))


def check_loaded(parts: Iterable[Mapping[str, Tensor]], source: str | os.PathLike, iteration: int) -> None:
    """Raise CheckpointError on all ranks where what was loaded from `source` is not finite.

    The message names the newest checkpoint that is.
    """
    if names := find_not_finite(parts):
        good = Ranks().on_rank_0(lambda: newest_finite(source))
        cure = "No other checkpoint there is finite; start anew"
        if good is not None:
            cure = f"Give --ckpt-step {good}, the newest that is finite"
        what = f"{source}, iteration {iteration}: {STATE}"
        raise CheckpointError(problem(what, Words(abbreviate(names)), RULE, cure))


def find_not_finite(parts: Iterable[Mapping[str, Tensor]]) -> list[str]:
    """The names of tensors that are not finite on any rank, sorted, on every rank. All ranks call it."""
    local_names = [name for tensors in parts for name in not_finite(tensors)]
    return Ranks().collect(lambda: local_names, lambda lists: sorted({name for names in lists for name in names}))


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that break RULE in what this rank holds of them."""
    local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    largest = {
        name: float(torch.linalg.vector_norm(tensor.float(), math.inf))
        for name, tensor in local.items()
        if tensor.numel()
    }
    limits = {name: MAX_WEIGHT if name.startswith("model/") else math.inf for name in largest}
    return [name for name, value in largest.items() if not value < limits[name]]  # a nan, too, is not below its limit


def newest_finite(folder: str | os.PathLike) -> int | None:
    """The newest undamaged iteration in `folder` that is finite; reads it, a tensor at a time."""
    for path in reversed(checkpoint_paths(folder)):
        if not checkpoint.verify(path) and not any(
            not_finite({name: tensor}) for name, tensor in checkpoint.read_tensors(path)
        ):
            return iteration_of(path)
    return None


def abbreviate(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
