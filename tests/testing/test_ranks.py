"""The pool of ranks: results, errors, hangs, deaths, reuse; and that one call leaves nothing behind for the next."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from megalith.common.errors import ConfigError
from megalith.testing import RankPool, run_ranks, worker


def add_rank(value):
    tensor = torch.tensor([float(value + dist.get_rank())], requires_grad=True)
    total = tensor * 1
    dist.all_reduce(total)
    return {
        "sum": total,
        "rank": dist.get_rank(),
        "world": int(os.environ["WORLD_SIZE"]),
        "threads": torch.get_num_threads(),
    }


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ConfigError("--num-layers: found 3")
    dist.barrier()


def hang_on(rank):
    while dist.get_rank() == rank:
        time.sleep(0.05)


def die_on(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def own_pid():
    return os.getpid()


def gather_threads():
    for _ in range(worker.MAX_THREADS):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    return os.getpid()


def raise_unpicklable():
    class Local(Exception):
        pass

    raise Local("seen")


def make_group_again(store):
    return worker._answer(worker.Job(0, 1, store, 10.0, sys.path, b""))  # torch refuses a second default group


def view_of_large():
    return torch.zeros(1000, 1000)[:2, :2]


def return_dtensor():
    return distribute_tensor(torch.ones(4), init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])


def sharded_product(extra_groups):
    for _ in range(extra_groups):  # shifts the names that the groups of the mesh get
        dist.new_group([0])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    weight = distribute_tensor(torch.arange(16.0).reshape(4, 4), mesh, [Shard(1)])
    product = distribute_tensor(torch.ones(2, 4), mesh, [Shard(1)]) @ weight.redistribute(mesh, [Shard(0)])
    return product.redistribute(mesh, [Replicate()]).to_local()


@pytest.fixture(scope="module")
def pool():
    pool = RankPool()
    yield pool
    pool.close()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_results_come_back_by_rank(pool, world_size):
    results = pool.run(add_rank, world_size, 10)
    assert [result["rank"] for result in results] == list(range(world_size))
    assert all(float(result["sum"]) == 10 * world_size + sum(range(world_size)) for result in results)
    assert all(result["world"] == world_size and result["threads"] == 1 for result in results)
    assert not results[0]["sum"].requires_grad


def test_ranks_are_reused(pool):
    first = pool.run(own_pid, 4)
    assert pool.run(own_pid, 4) == first
    assert pool.run(own_pid, 2) == first[:2]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads /proc, which only Linux has")
def test_a_rank_with_many_threads_is_replaced(pool):
    before = pool.run(gather_threads, 2)
    assert not set(before) & set(pool.run(own_pid, 2))


def test_an_exception_keeps_its_type_and_says_its_rank(pool):
    with pytest.raises(ConfigError, match="--num-layers: found 3") as caught:
        pool.run(fail_on, 3, 1)
    assert "raised on rank 1 of 3" in caught.value.__notes__[0]
    assert "in fail_on" in caught.value.__notes__[0]
    assert len(pool.run(own_pid, 3)) == 3


def test_a_rank_whose_group_was_not_made_is_replaced(pool, tmp_path):
    (answer,) = pool.run(make_group_again, 1, str(tmp_path / "store"))
    assert answer.retire and "twice" in str(answer.error)


def test_an_exception_that_cannot_travel_is_still_told(pool):
    with pytest.raises(RuntimeError, match="cannot be pickled") as caught:
        pool.run(raise_unpicklable, 1)
    assert "Local: seen" in caught.value.__notes__[0]


def test_a_hang_ends_with_stacks_and_the_pool_lives_on(pool):
    before = pool.run(own_pid, 2)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 did not answer in 2 s") as caught:
        pool.run(hang_on, 2, 1, timeout=2.0)
    assert "in hang_on" in str(caught.value)
    after = pool.run(own_pid, 2)
    assert after[1] != before[1]


def test_a_killed_rank_is_named_and_replaced(pool):
    before = pool.run(own_pid, 3)
    with pytest.raises(RuntimeError, match="rank 2 of 3 died with exit code -9"):
        pool.run(die_on, 3, 2)
    after = pool.run(own_pid, 3)
    assert after[2] != before[2]


def test_a_rank_killed_between_calls_is_replaced(pool):
    before = pool.run(own_pid, 2)
    os.kill(before[0], signal.SIGKILL)
    pool.ranks[0].process.join()
    after = pool.run(own_pid, 2)
    assert after[0] != before[0] and after[1] == before[1]


def test_a_view_travels_without_its_storage(pool):
    (view,) = pool.run(view_of_large, 1)
    assert view.shape == (2, 2) and view.untyped_storage().nbytes() == 16


def test_a_dtensor_is_refused_with_the_cure(pool):
    with pytest.raises(TypeError, match="full_tensor"):
        pool.run(return_dtensor, 2)


def test_meshes_of_an_earlier_call_are_forgotten(pool):
    expected = torch.ones(2, 4) @ torch.arange(16.0).reshape(4, 4)
    for extra_groups in (3, 0, 1):
        for product in pool.run(sharded_product, 4, extra_groups):
            assert torch.equal(product, expected)


def test_only_importable_functions_and_sensible_sizes(pool):
    with pytest.raises(TypeError, match="top level of a module"):
        pool.run(lambda: 1, 1)
    with pytest.raises(ValueError, match="1 to 8 ranks"):
        pool.run(own_pid, 9)


def test_the_fixture_is_the_shared_pool(ranks):
    assert ranks(own_pid, 2) == run_ranks(own_pid, 2)
