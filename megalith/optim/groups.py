"""Which parameters have weight decay: matrices, not biases and norms. A model's record says which are which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Decays = Callable[[str, torch.Tensor], bool]  # (name, parameter) -> whether weight decay applies to it


def matrices_decay(name: str, parameter: torch.Tensor) -> bool:
    """The default rule, where there is no record. A DTensor's `ndim` is that of the global tensor."""
    return parameter.ndim != 1


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    decays: Decays = matrices_decay,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, from `model.named_parameters()`: at most two, empty ones left out.

    Each holds `params` as (name, parameter) pairs, so that the optimizer keeps the names (`param_names`), and the
    factors `lr_mult` and `wd_mult` that `set_rates` applies. Frozen parameters (requires_grad False) are in no group.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    matrices = [pair for pair in trained if decays(*pair)]
    vectors = [pair for pair in trained if not decays(*pair)]
    groups = [{"params": matrices, "lr_mult": 1.0, "wd_mult": 1.0}, {"params": vectors, "lr_mult": 1.0, "wd_mult": 0.0}]
    return [group for group in groups if group["params"]]


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Give every group the step's learning rate and weight decay, each times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
