"""Weight gradients put off: the same bits, every product and every collective once, nothing left over."""

import collections

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megalith.parallel.matmul import Linear, Matmul, set_matmul
from megalith.parallel.pipeline.deferred import WeightGradientQueue
from megalith.testing import parity, run_ranks
from tests.parity.cases import SMALL

SLOW = pytest.mark.slow


def test_gradients_come_when_taken_and_are_the_same_to_the_bit():
    torch.manual_seed(0)
    model, queue = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)), WeightGradientQueue()
    x = torch.randn(2, 4, 5)
    model(x).square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    set_matmul(Matmul(queue), model)
    assert [type(module) for module in model] == [Linear, nn.Tanh, Linear] and list(model.state_dict()) == [
        "0.weight",
        "0.bias",
        "2.weight",
    ]
    for times in (1, 2):  # accumulates
        model(x.requires_grad_()).square().sum().backward()
        run = queue.take()
        assert not queue.deferred
        if times == 1:
            assert all(parameter.grad is None for parameter in model.parameters())
        run()
        for parameter, value in zip(model.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, times * value)


def test_each_micro_batch_has_its_own_work():
    model, queue = nn.Sequential(nn.Linear(2, 2)), WeightGradientQueue()
    set_matmul(Matmul(queue), model)
    runs = []
    for value in (1.0, 10.0):
        model(torch.full((1, 2), value, requires_grad=True)).sum().backward()
        runs.append(queue.take())
    runs[1]()
    assert model[0].weight.grad.tolist() == [[10.0, 10.0], [10.0, 10.0]]
    runs[0]()
    assert model[0].weight.grad.tolist() == [[11.0, 11.0], [11.0, 11.0]]
    runs[0]()  # done is done
    assert model[0].weight.grad.tolist() == [[11.0, 11.0], [11.0, 11.0]]


def test_frozen_weights_and_evaluation_leave_nothing_in_the_queue():
    model, queue = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False), WeightGradientQueue()
    set_matmul(Matmul(queue), model)
    model(torch.ones(1, 2, requires_grad=True)).sum().backward()
    with torch.no_grad():
        model.requires_grad_(True)(torch.ones(1, 2))
    assert not queue.deferred


class Counter(TorchDispatchMode):
    """Counts products and collectives."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::bmm"):
            self.calls["product"] += 1
        elif name.startswith("_c10d_functional::"):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def counted(config):
    with Counter() as counter:
        parity.measure(config)
    return counter.calls


@pytest.mark.parametrize(("ranks", "layout"), [
    (2, {}),
    pytest.param(4, {"tensor_model_parallel_size": 2}, marks=SLOW),
    pytest.param(4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "swiglu": True}, marks=SLOW),
    (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "attention_head_type": "multiquery"}),
])  # fmt: skip
def test_no_product_and_no_collective_runs_twice(ranks, layout):
    config = SMALL.replace(num_layers=4, pipeline_model_parallel_size=2, **layout)
    fused = run_ranks(counted, ranks, config.replace(pipeline_schedule="interleaved_1f1b"))
    for schedule in ("zero_bubble", "zbv", "dualpipev"):
        virtual = {"num_layers_per_virtual_pipeline_stage": 1} if schedule == "zero_bubble" else {}
        split = run_ranks(counted, ranks, config.replace(pipeline_schedule=schedule, **virtual))
        assert total(split) == total(fused)
        assert total(fused)["product"] > 0


def total(calls):
    return sum(calls, collections.Counter())
