"""Which parameters decay."""

import torch
from torch import nn

from megalith.config.parameter_kinds import BIAS
from megalith.optim.groups import parameter_groups, set_rates


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.table_bias = nn.Parameter(torch.zeros(2, 2))


def names(group):
    return [name for name, _ in group["params"]]


def test_biases_and_one_dimensional_parameters_do_not_decay():
    matrices, vectors = parameter_groups(Tiny().named_parameters())
    assert names(matrices) == ["table_bias", "q.weight", "embedding.weight"]  # a tied weight once
    assert names(vectors) == ["q.bias", "norm.weight", "norm.bias"]
    assert (matrices["wd_mult"], vectors["wd_mult"]) == (1.0, 0.0)


def test_a_two_dimensional_bias_does_not_decay():
    """Its kind says what it is; without kinds its dimensions are all that is known."""
    biases = [("experts.bias", nn.Parameter(torch.zeros(2, 2)))]
    (group,) = parameter_groups(biases, lambda name, parameter: BIAS.decays)
    assert group["wd_mult"] == 0.0
    assert parameter_groups(biases)[0]["wd_mult"] == 1.0


def test_frozen_parameters_are_in_no_group_and_empty_groups_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = parameter_groups(model.named_parameters())
    assert names(group) == ["weight"]


def test_rates_are_multiplied_by_each_groups_factors():
    optimizer = torch.optim.SGD(parameter_groups(Tiny().named_parameters()), lr=1.0)
    optimizer.param_groups[1]["lr_mult"] = 0.5
    set_rates(optimizer, 0.2, 0.1)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.2, 0.1), (0.1, 0.0)]
    assert optimizer.param_groups[1]["param_names"] == ["q.bias", "norm.weight", "norm.bias"]
