"""Weights and optimizer state under their canonical names, the same in every layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megalith.parallel.stage_module import StageModule


def weights(model: nn.Module | StageModule) -> dict[str, Tensor]:
    """{model/<parameter>: tensor}; a shared parameter appears once, under its first name."""
    return {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_state(model: nn.Module | StageModule, optimizer: Optimizer) -> dict[str, Tensor]:
    """{optimizer/<key>/<parameter>: tensor}. Steps are kept too: they set Adam's bias correction."""
    state = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer/{key}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return state


def create_optimizer_state(optimizer: Optimizer) -> None:
    """Create the optimizer's state, so that it can be loaded: by a step with gradients and rates of zero."""
    rates = [(group, group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group, _, _ in rates:
        group["lr"] = group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate, decay in rates:
        group["lr"], group["weight_decay"] = rate, decay
