"""Backward collectives overlap the computation of weight gradients: shown by the order of calls, free of noise."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalith.config.run import RunConfig
from megalith.layers.mask import AttentionMask
from megalith.parallel import mesh as meshes
from megalith.runtime.build import build_runtime
from megalith.testing import run_ranks
from tests.parity.cases import config_of

PRODUCTS = ("mm", "addmm")


class Events(TorchDispatchMode):
    """Names of collectives and matrix products, in the order they are called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "_c10d_functional" or name in PRODUCTS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def block_backward(config: RunConfig) -> tuple[list[str], list[str]]:
    """Events of one block's forward and backward pass."""
    mesh = meshes.init_mesh(config.parallel)
    block = build_runtime(config, mesh).model.layers["0"]
    length = 16 // (mesh.size("tp") if config.parallel.sequence_parallel else 1)
    x = torch.randn(2, length, 32, requires_grad=True)
    with Events() as forward:
        y = block(x, AttentionMask(), None, None)
    with Events() as backward:
        y.sum().backward()
    return forward.names, backward.names


def after_start(events: list[str], start: str) -> list[list[str]]:
    """For each collective of this name, what was called between its start and the next wait."""
    starts = [number for number, name in enumerate(events) if name == start]
    return [events[index + 1 : events.index("wait_tensor", index)] for index in starts]


def test_tensor_parallel_backward() -> None:
    forward, backward = run_ranks(block_backward, 2, config_of("absolute", "tp2"))[0]
    # After out and after down
    assert [name for name in forward if name not in PRODUCTS] == [
        "all_reduce",
        "wait_tensor",
    ] * 2
    in_flight = after_start(backward, "all_reduce")
    assert [len(products) for products in in_flight] == [1, 3]  # weight gradients of up; of q, k and v
    assert all(set(products) <= set(PRODUCTS) for products in in_flight)


def test_sequence_parallel_backward() -> None:
    forward, backward = run_ranks(block_backward, 2, config_of("absolute", "tp2 sp"))[0]
    gather, scatter = ["all_gather_into_tensor", "wait_tensor"], ["reduce_scatter_tensor", "wait_tensor"]
    assert [name for name in forward if name not in PRODUCTS] == (gather + scatter) * 2  # one gather for q, k and v
    # down: its gradient is gathered, and waited for. up: the input is gathered again while its gradient is computed,
    # and that is reduce-scattered while the weight's is computed. Then the same for out, and for q, k and v.
    waited, input_again, waited_too, input_again_too = after_start(backward, "all_gather_into_tensor")
    assert waited == waited_too == []
    assert set(input_again[:-1]) <= set(PRODUCTS) and len(input_again) == 2 and len(input_again_too) == 4
    assert [len(rest) for rest in scattered(backward)] == [1, 3]


def scattered(events: list[str]) -> list[list[str]]:
    """For each reduce-scatter, the products between its start and its own wait (the one after the gather's)."""
    found = []
    for number, name in enumerate(events):
        if name == "reduce_scatter_tensor":
            first = events.index("wait_tensor", number)
            second = events.index("wait_tensor", first + 1)
            found.append([name for name in events[first:second] if name in PRODUCTS])
    return found


def compiled_code(config: RunConfig) -> str:
    """The code that torch.compile makes for a block's backward pass."""
    from torch._inductor.utils import run_and_get_code  # imports the compiler

    block = build_runtime(config, meshes.init_mesh(config.parallel)).model.layers["0"]

    def step():
        block(torch.randn(2, 16, 32, requires_grad=True), AttentionMask(), None, None).sum().backward()

    return run_and_get_code(step)[1][-1]


@pytest.mark.slow
def test_compiled_backward_keeps_the_order() -> None:
    code = run_ranks(compiled_code, 2, config_of("absolute", "tp2 compile"), timeout=280)[0]
    calls = [
        line
        for line in code[code.index("def call") :].splitlines()
        if line.lstrip().startswith(("extern_kernels", "torch.ops._c10d"))
    ]
    first = next(number for number, line in enumerate(calls) if "all_reduce" in line)
    assert "extern_kernels.mm" in calls[first + 1] and "wait_tensor" in calls[first + 2]
