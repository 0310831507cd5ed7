"""Errors of one rank reach all; results arrive where they should; one process needs no group."""

import pytest
import torch.distributed as dist

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import CheckpointError


def work(group_size):
    group = dist.new_group(list(range(group_size)))
    ranks = Ranks(group, own=True) if dist.get_rank() < group_size else Ranks()
    assert Ranks().group is dist.group.WORLD and ranks.group is not group
    if dist.get_rank() >= group_size:
        return None
    seen = [
        ranks.collect(lambda: ranks.rank * 10, sum),
        ranks.distribute(lambda: ranks.rank, lambda all_ranks: [number * number for number in all_ranks]),
        ranks.every(lambda: ranks.rank + 1),
        ranks.first(lambda: "said by 0"),
    ]
    for place, call in {
        "rank 1: ZeroDivisionError": lambda: ranks.every(lambda: 1 // (1 - ranks.rank)),
        "KeyError: 'k'": lambda: ranks.first(lambda: {}["k"]),
        "in the end": lambda: ranks.distribute(lambda: None, lambda _: fail("in the end")),
        "alike": lambda: ranks.every(lambda: fail("alike")),
    }.items():
        with pytest.raises(CheckpointError) as caught:
            call()
        assert place in str(caught.value) and (place != "alike" or str(caught.value) == "alike")
    return seen


def without_a_cpu_backend():
    """As under NCCL alone: a gloo group is made beside the group, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        first, second = Ranks(), Ranks()
    assert first.group is second.group is not dist.group.WORLD
    return first.collect(lambda: first.rank, sum)


def test_group_beside_an_accelerators(ranks):
    assert ranks(without_a_cpu_backend, 2) == [1, 1]


def fail(text):
    raise CheckpointError(text)


def test_several_ranks(ranks):
    results = ranks(work, 3, 2)
    assert results == [[10, 0, 1, "said by 0"], [10, 1, 2, "said by 0"], None]


def test_one_process():
    alone = Ranks()
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.collect(lambda: 3, sum) == 3 and alone.distribute(lambda: 3, lambda seen: [seen]) == [3]
    assert alone.every(lambda: 4) == 4 and alone.first(lambda: None) is None
    with pytest.raises(CheckpointError, match="ZeroDivisionError") as caught:
        alone.every(lambda: 1 // 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
