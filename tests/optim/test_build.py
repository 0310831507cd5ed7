"""Optimizers by name, and one AdamW step worked out by hand."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from megalith.common.errors import ConfigError
from megalith.config.sections.optimizer import OptimizerConfig
from megalith.optim.build import build_optimizer
from megalith.optim.groups import set_rates


def one(value, grad, shape=(1, 1)):
    parameter = nn.Parameter(torch.full(shape, value))
    parameter.grad = torch.full(shape, grad)
    return parameter


def my_optimizer(groups, config):
    return torch.optim.Adagrad(groups, lr=config.lr)


def test_adamw_takes_two_steps_as_the_paper_says():
    config = OptimizerConfig(lr=0.1, weight_decay=0.5, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-3)
    weight, bias = one(2.0, 0.3), one(2.0, 0.3, (1,))
    optimizer = build_optimizer(config, [("weight", weight), ("bias", bias)])
    expected = {"weight": 2.0, "bias": 2.0}
    first = second = 0.0
    for step, lr in ((1, 0.1), (2, 0.05)):
        set_rates(optimizer, lr, 0.5)
        optimizer.step()
        first, second = 0.9 * first + 0.1 * 0.3, 0.95 * second + 0.05 * 0.09
        move = lr * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.95**step)) + 1e-3)
        expected = {"weight": expected["weight"] * (1 - lr * 0.5) - move, "bias": expected["bias"] - move}
    assert weight.item() == pytest.approx(expected["weight"], rel=1e-6)
    assert bias.item() == pytest.approx(expected["bias"], rel=1e-6)


def sharded_steps(sharded):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    if sharded:
        fully_shard(model)
    optimizer = build_optimizer(OptimizerConfig(lr=0.1), model.named_parameters())
    for _ in range(3):
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.full_tensor() if sharded else parameter for parameter in model.parameters()]


def test_the_fused_step_on_sharded_parameters_equals_one_process(ranks):
    for mine in ranks(sharded_steps, 2, True):
        for sharded, whole in zip(mine, sharded_steps(False), strict=True):
            torch.testing.assert_close(sharded, whole)


def test_sgd_adds_weight_decay_to_the_gradient():
    weight = one(2.0, 0.3)
    optimizer = build_optimizer(
        OptimizerConfig(optimizer="sgd", lr=0.1, weight_decay=0.5, sgd_momentum=0.9), [("weight", weight)]
    )
    set_rates(optimizer, 0.1, 0.5)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 - 0.1 * (0.3 + 0.5 * 2.0))


def test_fused_on_the_cpu_and_not_where_torch_refuses():
    assert build_optimizer(OptimizerConfig(lr=0.1), [("w", one(1.0, 1.0))]).defaults["fused"] is True
    meta = nn.Parameter(torch.zeros(2, 2, device="meta"))
    assert build_optimizer(OptimizerConfig(lr=0.1), [("w", meta)]).defaults["fused"] is False


def test_ones_own_by_module_and_name():
    config = OptimizerConfig(optimizer=f"{__name__}:my_optimizer", lr=0.1)
    assert isinstance(build_optimizer(config, [("w", one(1.0, 1.0))]), torch.optim.Adagrad)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match="adamw"):
        build_optimizer(OptimizerConfig(optimizer="adamv", lr=0.1), [("w", one(1.0, 1.0))])
