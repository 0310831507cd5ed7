"""Weights and optimizer state under their canonical names, the same in every layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megalith.parallel.stage_module import StageModule

RATES = ("lr", "weight_decay")  # of a parameter group; where they are 0, a step without gradients changes no weights


def weights(model: nn.Module | StageModule, trained: bool = False) -> dict[str, Tensor]:
    """{model/<parameter>: tensor}; a shared parameter appears once, under its first name.

    trained: leave out frozen ones.
    """
    return {
        f"model/{name}": parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not trained
    }


def optimizer_state(model: nn.Module | StageModule, optimizer: Optimizer) -> dict[str, Tensor]:
    """{optimizer/<key>/<parameter>: tensor}. Steps are kept too: they set Adam's bias correction.

    What an optimizer keeps as a Python number is a new tensor here; see `restore_numbers`.
    """
    state = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer/{key}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return state


def restore_numbers(model: nn.Module | StageModule, optimizer: Optimizer, state: Mapping[str, Tensor]) -> None:
    """Give the optimizer the Python numbers among a `state` that was filled since `optimizer_state` returned it."""
    for name, parameter in model.named_parameters():
        values = optimizer.state.get(parameter, {})
        for key, value in values.items():
            if not isinstance(value, Tensor):
                values[key] = type(value)(state[f"optimizer/{key}/{name}"].item())


def create_optimizer_state(optimizer: Optimizer) -> None:
    """Create the optimizer's state, so that it can be loaded: by a step with gradients and rates of zero."""
    rates = [(group, {name: group[name] for name in RATES if name in group}) for group in optimizer.param_groups]
    for group, own in rates:
        group.update(dict.fromkeys(own, 0.0))
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, own in rates:
        group.update(own)
