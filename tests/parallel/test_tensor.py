"""What parity's training step does not pass through: logits, free losses, odd lengths."""

import functools

import pytest
import torch
from torch import Tensor

from megalith.layers.random import key, normal
from megalith.parallel import mesh as meshes
from megalith.parallel.collectives import Axis
from megalith.parallel.sequence import unsharded_sequences
from megalith.parallel.sharding import shard_range
from megalith.runtime.build import Runtime, build_runtime
from megalith.testing import run_ranks
from megalith.testing.parity import full_tensor
from tests.parity.cases import LAYOUTS, config_of

FORM = "odd vocabulary"  # 67 rows on 4 ranks: the last has one less


def placed(layout: str | None) -> Runtime:
    config = config_of(FORM, layout)
    return build_runtime(config, meshes.init_mesh(config.parallel), torch.float64)


def ids(length: int = 16) -> Tensor:
    return (torch.arange(2 * length) * 7 % 67).view(2, length)


def through_logits(layout: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of some function of them."""
    runtime = placed(layout)
    logits = runtime.model(ids())
    weights = normal(key("weights"), torch.arange(logits.numel())).view(logits.shape)
    (logits * weights).sum().backward()
    runtime.finish_gradients()
    return logits.detach(), {name: full_tensor(parameter.grad) for name, parameter in runtime.named_parameters()}


def through_losses(layout: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses without weights, some labels hidden, and the gradients of their squares."""
    runtime = placed(layout)
    labels = ids().roll(-1, 1)
    labels[:, ::5] = -100
    losses = runtime.model(ids(), labels=labels)
    losses.square().sum().backward()
    runtime.finish_gradients()
    return losses.detach(), {name: full_tensor(parameter.grad) for name, parameter in runtime.named_parameters()}


@functools.cache
def on_one_process(function):
    return run_ranks(function, 1, None)[0]


@pytest.mark.parametrize("layout", ["tp2 sp", "tp4"])
@pytest.mark.parametrize("function", [through_logits, through_losses])
def test_outputs_and_gradients(function, layout: str) -> None:
    expected, gradients = on_one_process(function)
    for found, others in run_ranks(function, LAYOUTS[layout][0], layout):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def odd_length(layout: str | None) -> tuple[Tensor, str]:
    """Logits of a length that no rank number divides, and what is said where sequences must split."""
    runtime, text = placed(layout), ""
    runtime.train(False)
    try:
        with torch.no_grad(), unsharded_sequences(runtime.model):
            logits = runtime.model(ids(13))
        runtime.model(ids(13))
    except ValueError as error:
        text = str(error)
    return logits, text


def test_any_length_where_sequences_are_whole() -> None:
    expected, _ = run_ranks(odd_length, 1, None)[0]
    for logits, text in run_ranks(odd_length, 2, "tp2 sp"):
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
        assert "sequence length" in text and "found 13" in text and "unsharded_sequences" in text


@pytest.mark.parametrize(("size", "ranks"), [(67, 4), (64, 4), (5, 4), (9, 2)])
def test_shares_are_those_of_a_dtensor(size: int, ranks: int) -> None:
    found = []
    for rank in range(ranks):
        axis = Axis.__new__(Axis)
        axis.size, axis.rank = ranks, rank
        found.append(shard_range(size, axis))
    chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(ranks)]
    chunks += [[]] * (ranks - len(chunks))
    assert [list(range(first, first + number)) for first, number in found] == chunks
