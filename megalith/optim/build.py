"""Optimizers by name. Another one is named as `module:name`, a function of (groups, config.optimizer)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megalith.common.registry import Registry
from megalith.config.sections.optimizer import OptimizerConfig
from megalith.optim.groups import Decays, matrices_decay, parameter_groups

OPTIMIZERS = Registry(
    "optimizer",
    {"adam": "megalith.optim.build:adamw", "adamw": "megalith.optim.build:adamw", "sgd": "megalith.optim.build:sgd"},
)

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")  # on which torch has fused steps


def build_optimizer(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    decays: Decays = matrices_decay,
) -> torch.optim.Optimizer:
    """The optimizer that `config.optimizer` names, over the groups of these parameters. decays: see groups.py.

    It has the peak learning rate until `set_rates` sets a step's. Raises ConfigError for an unknown name.
    """
    return OPTIMIZERS.find(config.optimizer)(parameter_groups(named_parameters, decays), config)


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay and bias correction (Loshchilov and Hutter, 2019), fused where torch can."""
    return torch.optim.AdamW(
        groups,
        lr=config.lr or 0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=_fused(groups),
    )


def sgd(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Gradient descent with momentum. As in Megatron, weight decay is added to the gradient here (it is not decoupled).

    Not fused, as torch's fused step does not support DTensors.
    """
    return torch.optim.SGD(groups, lr=config.lr or 0.0, momentum=config.sgd_momentum, weight_decay=config.weight_decay)


def _fused(groups: list[dict[str, Any]]) -> bool:
    """Whether torch has a fused step for all of them; it raises for other devices, such as meta."""
    return all(parameter.device.type in FUSED_DEVICES for group in groups for _, parameter in group["params"])
