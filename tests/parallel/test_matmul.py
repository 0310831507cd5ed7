"""The seam of matrix products: a number format and an accumulation of its own plug in, in every layout, by `use`."""

import pytest
import torch
from torch import Tensor, nn

from megalith.layers.mask import AttentionMask
from megalith.parallel import mesh as meshes
from megalith.parallel.matmul import Linear, Matmul, linear, linears_of_one_input, set_matmul
from megalith.parallel.pipeline.deferred import WeightGradientQueue
from megalith.runtime.build import build_runtime
from megalith.testing import run_ranks
from tests.parity.cases import config_of


def test_the_default_is_torchs_to_the_bit():
    torch.manual_seed(0)
    for shape, bias in [((2, 4, 5), True), ((2, 4, 5), False), ((3, 5), True), ((5,), True)]:
        layer, x = nn.Linear(5, 7, bias=bias), torch.randn(shape)
        found = []
        for compute in (layer, lambda x, layer=layer: linear(x, layer.weight, layer.bias, Matmul())):
            layer.zero_grad()
            inputs = x.clone().requires_grad_()
            y = compute(inputs)
            y.square().sum().backward()
            found.append([y, inputs.grad, *(parameter.grad for parameter in layer.parameters())])
        for torch_result, result in zip(*found, strict=True):
            assert torch.equal(torch_result, result)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_compiles_whole_with_and_without_gradients(number):
    weights, x = [torch.randn(3, 5, requires_grad=True) for _ in range(number)], torch.randn(2, 5)
    torch.compiler.reset()
    for compute in (torch.no_grad(linears_of_one_input), linears_of_one_input):
        expected = compute(x, weights, [None] * number, Matmul())
        compiled = torch.compile(compute, fullgraph=True, backend="eager")
        assert all(map(torch.equal, compiled(x, weights, [None] * number, Matmul()), expected))


def test_nothing_is_computed_that_nobody_needs():
    class Refuses(Matmul):
        input_gradient = weight_gradient = None

    weight, x = torch.randn(3, 5, requires_grad=True), torch.randn(2, 5)
    with pytest.raises(TypeError):
        linear(x, weight, None, Refuses()).sum().backward()
    Refuses.weight_gradient = lambda self, gradient, x: gradient.t() @ x
    linear(x, weight, None, Refuses()).sum().backward()  # x needs no gradient
    with pytest.raises(TypeError):
        linear(x.requires_grad_(), weight, None, Refuses()).sum().backward()


class Coarse(Matmul):
    """Every factor of every product in a narrower format, as FP8 would have it; counts the products."""

    def __init__(self):
        super().__init__()
        self.counts = {"output": 0, "input": 0, "weight": 0}

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.counts["output"] += 1
        return super().output(coarse(x), coarse(weight), bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
        self.counts["input"] += 1
        return super().input_gradient(coarse(gradient), coarse(weight), total)

    def weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        self.counts["weight"] += 1
        return super().weight_gradient(coarse(gradient), coarse(x))


def coarse(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def test_a_format_of_its_own():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    exact, x = model(torch.ones(2, 5)), torch.ones(2, 5)
    product = Coarse()
    set_matmul(product, model)
    assert [type(module) for module in model] == [Linear, nn.Tanh, Linear]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    y = model(x.requires_grad_())
    y.sum().backward()
    assert product.counts == {"output": 2, "input": 2, "weight": 2}
    assert not torch.equal(y, exact) and torch.allclose(y, exact, rtol=0.05, atol=0.05)


class Accumulated:
    """Gradients added up in a buffer of their own, as fused accumulation does, in the backward pass."""

    def __init__(self):
        self.sums: dict[Tensor, Tensor] = {}

    def put(self, parameter, compute):
        with torch.no_grad():
            self.sums[parameter] = self.sums.get(parameter, 0) + compute()


def test_gradients_that_are_added_up_elsewhere():
    torch.manual_seed(0)
    first, second, x, kept = nn.Linear(4, 3), nn.Linear(4, 2, bias=False), torch.randn(2, 6, 4), Accumulated()
    parameters = [first.weight, second.weight, first.bias]
    (first(x).sum() + second(x).square().sum()).backward()
    expected = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    for times in (1, 2):
        inputs = x.clone().requires_grad_()
        y, z = linears_of_one_input(inputs, parameters[:2], (first.bias, None), Matmul(kept))
        (y.sum() + z.square().sum()).backward()
        for parameter, gradient in zip(parameters, expected, strict=True):
            assert parameter.grad is None and torch.allclose(kept.sums[parameter], times * gradient)


def test_gradients_put_off_of_a_layer_whose_input_needs_none():
    """A head on a frozen model."""
    layer, x, queue = nn.Linear(4, 3), torch.randn(2, 4), WeightGradientQueue()
    layer(x).square().sum().backward()
    expected, model = [layer.weight.grad, layer.bias.grad], nn.Sequential(layer)
    layer.zero_grad()
    set_matmul(Matmul(queue), model)
    model(x).square().sum().backward()
    assert layer.weight.grad is None
    queue.take()()
    assert torch.equal(layer.weight.grad, expected[0]) and torch.equal(layer.bias.grad, expected[1])


def test_a_layer_keeps_what_it_has_and_all_its_names():
    model = nn.Module()
    model.one = model.two = nn.Linear(4, 3)
    called = []
    model.one.register_forward_hook(lambda *arguments: called.append(1))
    set_matmul(Matmul(), model.eval())
    assert model.one is model.two and type(model.two) is Linear and not model.one.training
    model.two(torch.ones(4))
    assert called == [1]


def products(config) -> tuple[int, dict[str, int]]:
    """(linear layers of this rank's blocks, products of their forward and backward pass)."""
    block, product = build_runtime(config, meshes.init_mesh(config.parallel)).model.layers["0"], Coarse()
    set_matmul(product, block)
    length = 8 if config.parallel.sequence_parallel else 16
    block(torch.randn(2, length, 32, requires_grad=True), AttentionMask(), None, None).sum().backward()
    layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
    assert all(isinstance(module, Linear) for module in layers)
    return len(layers), product.counts


@pytest.mark.parametrize("layout", [None, "tp2", "tp2 sp"])
def test_every_linear_layer_goes_through_it(layout):
    for layers, counts in run_ranks(products, 1 if layout is None else 2, config_of("rotary", layout)):
        assert layers == 7  # q, k, v, out, gate, up, down
        assert counts == {"output": 7, "input": 7, "weight": 7}
