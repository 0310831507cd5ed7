"""Initial weights by counter: whoever draws a part of a tensor draws that part of the whole."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megalith.layers import random
from megalith.runtime.initialize import fill, global_index


def whole(shape: tuple[int, ...], kind: str = "normal", value: float = 0.02) -> torch.Tensor:
    tensor = torch.empty(shape)
    fill(tensor, kind, value, random.key(1, "w"))
    return tensor


def test_kinds() -> None:
    x = whole((300, 400))
    assert x.std().item() == pytest.approx(0.02, rel=0.02) and abs(x.mean().item()) < 3e-4
    y = whole((300, 400), "xavier", 1.0)
    limit = math.sqrt(6 / 700)
    assert y.abs().max() <= limit and y.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert (whole((3, 4), "constant", 2.5) == 2.5).all()


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = whole((37, 11))
    monkeypatch.setattr(random, "CHUNK", 10)
    assert torch.equal(whole((37, 11)), x)


def test_precision_only_rounds() -> None:
    half = torch.empty(37, 11, dtype=torch.bfloat16)
    fill(half, "normal", 0.02, random.key(1, "w"))
    assert torch.equal(half, whole((37, 11)).bfloat16())


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_global_index_counts_in_the_whole_tensor(sizes: list[tuple[int, int, int]]) -> None:
    local, offset = tuple(n for n, _, _ in sizes), tuple(first for _, first, _ in sizes)
    shape = tuple(n + first + more for n, first, more in sizes)
    part = torch.arange(math.prod(shape)).view(shape)[tuple(slice(f, f + n) for f, n in zip(offset, local))]
    assert torch.equal(global_index(torch.arange(math.prod(local)), local, offset, shape), part.flatten())


def _draw_shards() -> list[bool]:
    """On every rank: a tensor drawn as a DTensor and gathered equals the whole; also of uneven and 2-d shards."""
    mesh, mesh_2d = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    cases = [
        (mesh, (8, 6), [Shard(0)]),
        (mesh, (7, 6), [Shard(0)]),
        (mesh, (3, 6), [Shard(0)]),
        (mesh, (6, 10), [Shard(1)]),
        (mesh, (9,), [Shard(0)]),
        (mesh, (5, 4), [Replicate()]),
        (mesh_2d, (9, 7), [Shard(0), Shard(1)]),
        (mesh_2d, (9, 7), [Shard(1), Shard(0)]),
        (mesh_2d, (9, 4), [Shard(0), Shard(0)]),
    ]
    same = []
    for where, shape, placements in cases:
        tensor = distribute_tensor(torch.zeros(shape), where, placements)
        fill(tensor, "normal", 0.02, random.key(1, "w"))
        same.append(isinstance(tensor, DTensor) and torch.equal(tensor.full_tensor(), whole(shape)))
    return same


def test_shards_are_slices_of_the_whole(ranks) -> None:
    for results in ranks(_draw_shards, 4):
        assert all(results), results
