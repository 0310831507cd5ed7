"""Errors of one rank reach all; results arrive where they should; one process needs no group."""

import functools

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import CheckpointError
from megalith.config.run import RunConfig
from megalith.training.failures import check_same_config
from megalith.training.pretrain import on_main_process


def work(group_size):
    group = dist.new_group(list(range(group_size)))
    ranks = Ranks(group, new_group=True) if dist.get_rank() < group_size else Ranks()
    assert Ranks().group is dist.group.WORLD and ranks.group is not group
    if dist.get_rank() >= group_size:
        return None
    seen = [
        ranks.collect(lambda: ranks.rank * 10, sum),
        ranks.distribute(lambda: ranks.rank, lambda all_ranks: [number * number for number in all_ranks]),
        ranks.on_every_rank(lambda: ranks.rank + 1),
        ranks.on_rank_0(lambda: "said by 0"),
    ]
    for expected, call in {
        "rank 1: ZeroDivisionError": lambda: ranks.on_every_rank(lambda: 1 // (1 - ranks.rank)),
        "KeyError: 'k'": lambda: ranks.on_rank_0(lambda: {}["k"]),
        "in the end": lambda: ranks.distribute(lambda: None, lambda _: fail("in the end")),
        "pickle": lambda: ranks.collect(lambda: (lambda: 1) if ranks.rank else 1),
        "1 entries for 2 ranks": lambda: ranks.distribute(lambda: None, lambda _: [1]),
        "has no len": lambda: ranks.distribute(lambda: None, lambda _: None),
        "alike": lambda: ranks.on_every_rank(lambda: fail("alike")),
    }.items():
        with pytest.raises(CheckpointError) as caught:
            call()
        assert expected in str(caught.value) and (expected != "alike" or str(caught.value) == "alike")
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
    assert alone.on_every_rank(lambda: 4) == 4 and alone.on_rank_0(lambda: None) is None
    with pytest.raises(CheckpointError, match="ZeroDivisionError") as caught:
        alone.on_every_rank(lambda: 1 // 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.fixture
def simulated():
    """This process as rank 3 of 8, of which there is only this one."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    yield
    dist.destroy_process_group()


def test_a_simulated_world(simulated):
    alike = Ranks()
    assert (alike.rank, alike.size) == (3, 8)
    assert alike.collect(lambda: 5, sum) == 40
    assert alike.distribute(lambda: 5, lambda results: [number for number, _ in enumerate(results)]) == 3
    assert alike.on_every_rank(lambda: 4) == 4 and alike.on_rank_0(lambda: "said here") == "said here"
    with pytest.raises(CheckpointError) as caught:
        alike.on_every_rank(lambda: fail("once"))
    assert str(caught.value) == "once"
    check_same_config(RunConfig())
    on_main_process(lambda: None)
    with pytest.raises(OSError, match="no disk"):
        on_main_process(functools.partial(refuse, OSError("no disk")))


def refuse(error):
    raise error
