"""Sums in shared memory equal those of the process group, bit for bit, and are the same on all ranks."""

import pytest
import torch
import torch.distributed as dist

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import RankError
from megalith.parallel import shared_memory
from megalith.parallel.shared_memory import shared_memory_sum
from megalith.testing.ranks import run_ranks


def sums(dtype: torch.dtype) -> list[torch.Tensor]:
    """Many sums of different shapes, one after the other, some of which are late on one rank."""
    shared, rank = shared_memory_sum(Ranks(), torch.device("cpu")), dist.get_rank()
    found = []
    for number in range(400):
        drawn = torch.Generator().manual_seed(number * 8 + rank)
        x = torch.randn(1 + number % 5, 3, 1 + number % 97, generator=drawn).to(dtype)
        if number % 100 == 10 * rank:
            torch.randn(300, 300) @ torch.randn(300, 300)
        before = x.clone()
        total, expected = shared(x), x.clone()
        assert torch.equal(x, before) and shared.takes(x)
        dist.all_reduce(expected)
        torch.testing.assert_close(total, expected)
        if dist.get_world_size() == 2:
            assert torch.equal(total, expected)
        found.append(total)
    assert not shared.takes(torch.empty(1 << 20))
    return found


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float32), (2, torch.bfloat16), (3, torch.float64)])
def test_sums(ranks: int, dtype: torch.dtype) -> None:
    first, *others = run_ranks(sums, ranks, dtype)
    for other in others:
        assert all(map(torch.equal, first, other))


def missing() -> str:
    shared = shared_memory_sum(Ranks(), torch.device("cpu"))
    shared_memory.PATIENCE = 0.2
    try:
        if dist.get_rank() == 0:
            with pytest.raises(RankError) as caught:
                shared(torch.ones(3))
            return str(caught.value)
    finally:
        shared_memory.PATIENCE = 600.0
    return ""


def test_a_rank_that_never_comes_is_named() -> None:
    assert "Ranks [1]" in run_ranks(missing, 2)[0]


def other_machine() -> object:
    """Rank 1 does not see the memory of rank 0."""
    folder = shared_memory.attach
    if dist.get_rank() == 1:
        shared_memory.attach = lambda path, secret: folder(path, b"another machine.")
    try:
        return shared_memory_sum(Ranks(), torch.device("cpu"))
    finally:
        shared_memory.attach = folder


def test_none_where_the_memory_is_not_the_same() -> None:
    assert run_ranks(other_machine, 2) == [None, None]
    assert run_ranks(on_accelerators, 1) == [None]


def on_accelerators() -> object:
    return shared_memory_sum(Ranks(), torch.device("cuda"))
