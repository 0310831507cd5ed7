"""Loaders in processes that communicate: those that hold a model together see one batch, whatever is random in it."""

import random

import numpy as np
import pytest
import torch
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset

from megalith.common.errors import DataError
from megalith.config.sections.parallel import ParallelConfig
from megalith.integrations.accelerate.data import prepare_loader, skip_first_batches
from megalith.runtime.build import init_mesh
from megalith.testing.ranks import run_ranks
from tests.integrations.accelerate.data.test_loaders import Numbers
from tests.integrations.accelerate.helpers import accelerating

LAYOUTS = {  # tensor, pipeline and context parallel
    "tp2 dp2": {"tensor_model_parallel_size": 2},
    "pp2 dp2": {"pipeline_model_parallel_size": 2},
    "tp2 pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "cp2 dp2": {"context_parallel_size": 2},
    "dp4": {},
}


class RandomStream(IterableDataset):
    """Numbers in an order that each process draws for itself."""

    def __iter__(self):
        order = list(range(19))
        random.SystemRandom().shuffle(order)
        return iter(order)


def masked(samples):
    """Draws from all generators there are, and from one that nobody can seed."""
    drawn = [torch.rand(()).item(), random.random(), np.random.rand(), random.SystemRandom().random()]
    numbers = [int(each["number"] if isinstance(each, dict) else each) for each in samples]
    return {"number": torch.tensor(numbers), "drawn": torch.tensor(drawn, dtype=torch.float64)}


def failing(samples):
    if any(int(each["number"]) == 5 for each in samples):
        raise KeyError("no such column")
    return torch.tensor([int(each["number"]) for each in samples])


def stream():
    return DataLoader(RandomStream(), batch_size=2, collate_fn=masked)


def shuffled():
    return DataLoader(Numbers(19), batch_size=2, shuffle=True, collate_fn=masked)


def prepared(layout, make, **options):
    """The mesh, and the prepared loader of this process."""
    mesh = init_mesh(ParallelConfig(device="cpu", **LAYOUTS[layout]))
    loader = prepare_loader(
        make(), num_micro_batches=1, rank=mesh.data_rank, size=mesh.data_size, device=mesh.device, mesh=mesh,
        dataloader_config=DataLoaderConfiguration(**options), rng_types=["generator"],
    )  # fmt: skip
    return mesh, loader


def two_epochs(layout, kind):
    """(data-parallel rank, [samples], [what was drawn in collating], [drawn by the loop]) of two epochs."""
    with accelerating():
        mesh, loader = prepared(layout, stream if kind == "stream" else shuffled)
        torch.manual_seed(mesh.global_rank)  # as device-specific seeds, or none, leave the processes
        random.seed(mesh.global_rank)
        np.random.seed(mesh.global_rank)
        batches, drawn, loop = [], [], []
        for _ in range(2):
            for batch in loader:
                numbers = batch["number"].tolist()
                batches.append(numbers[: len(numbers) - loader.repeated])
                drawn.append(batch["drawn"].tolist())
                loop.append((torch.rand(()).item(), random.random(), np.random.rand()))
        return mesh.data_rank, batches, drawn, loop


@pytest.mark.parametrize(("kind", "layout"), [("sampler", "tp2 dp2"), ("stream", "pp2 dp2")])
def test_some_layouts(kind, layout):
    """Of the cases below, those that the covering set runs."""
    check_one_batch_for_those_that_hold_a_model(layout, kind)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["sampler", "stream"])
def test_all_layouts(kind, layout):
    check_one_batch_for_those_that_hold_a_model(layout, kind)


def check_one_batch_for_those_that_hold_a_model(layout, kind):
    found = run_ranks(two_epochs, 4, layout, kind)
    by_data_rank = {}
    for rank, *of_process in found:
        batches, drawn, loop = by_data_rank.setdefault(rank, of_process)
        assert of_process[0] == batches and of_process[1] == drawn and of_process[2] == loop
    parts_of_batches = zip(*(by_data_rank[rank][0] for rank in sorted(by_data_rank)), strict=True)
    together = [[one for part in parts for one in part] for parts in parts_of_batches]
    epochs = [together[: len(together) // 2], together[len(together) // 2 :]]
    for epoch in epochs:
        assert sorted(one for batch in epoch for one in batch) == list(range(19))
    assert epochs[0] != epochs[1]
    if kind != "stream" and len(by_data_rank) > 1:
        assert by_data_rank[0][2] != by_data_rank[1][2]  # data-parallel processes keep their own random numbers


def order_of_seed(layout):
    with accelerating():
        torch.manual_seed(0)  # rank 0's counts; the others have drawn more before
        mesh, loader = prepared(layout, lambda: DataLoader(Numbers(19), batch_size=2, shuffle=True))
        torch.rand(mesh.global_rank)
        return mesh.data_rank, [batch["number"].tolist() for batch in loader][:-1]


def test_the_order_is_that_of_one_process():
    torch.manual_seed(0)
    expected = [batch["number"].tolist() for batch in DataLoader(Numbers(19), batch_size=8, shuffle=True)]
    found = run_ranks(order_of_seed, 4, "dp4")
    assert [[one for part in parts for one in part] for parts in zip(*(part for _, part in found))] == expected[:-1]


def seedable(layout):
    with accelerating():
        torch.manual_seed(torch.distributed.get_rank())
        _, loader = prepared(
            layout, lambda: DataLoader(Numbers(16), batch_size=2, shuffle=True), use_seedable_sampler=True
        )
        return [batch["number"].tolist() for batch in loader]


def test_the_seed_of_a_seedable_sampler_is_that_of_rank_0():
    found = run_ranks(seedable, 4, "tp2 dp2")
    assert found[0] == found[1] and found[2] == found[3]
    assert sorted(one for batch in found[0] + found[2] for one in batch) == list(range(16))


def fails(layout):
    with accelerating():
        _, loader = prepared(layout, lambda: DataLoader(Numbers(16), batch_size=2, collate_fn=failing))
        try:
            for _ in loader:
                pass
        except (KeyError, DataError) as error:
            return type(error).__name__, str(error)


def test_an_error_of_who_reads_is_raised_by_all():
    found = run_ranks(fails, 4, "tp2 pp2")
    assert found[0] == ("KeyError", "'no such column'")
    assert found[1:] == [("DataError", found[1][1])] * 3 and "KeyError: 'no such column'" in found[1][1]


def states(layout):
    """The states in the middle of an epoch and after one; then what a loader that resumes the first gives."""
    with accelerating():
        torch.manual_seed(torch.distributed.get_rank())

        def make():
            return DataLoader(Numbers(16), 2, shuffle=True, generator=torch.Generator().manual_seed(3))

        mesh, loader = prepared(layout, make)
        batches = []
        for number, batch in enumerate(loader):
            batches.append(batch["number"].tolist())
            if number == 1:
                middle = loader.state_dict()
        _, again = prepared(layout, make)
        again.load_state_dict(middle)
        rest = [batch["number"].tolist() for batch in skip_first_batches(again, 2)]
        return mesh.data_rank, middle, loader.state_dict(), batches[2:], rest


def test_states_are_equal_on_all_processes():
    found = run_ranks(states, 4, "tp2 dp2")
    for _, middle, end, rest, resumed in found:
        assert rest == resumed
        for state, first in ((middle, found[0][1]), (end, found[0][2])):
            assert (state["epoch"], state["batches"]) == (first["epoch"], first["batches"])
            assert all(map(torch.equal, state["random"]["generators"], first["random"]["generators"]))


def without_mesh(layout):
    with accelerating():
        try:
            prepare_loader(
                DataLoader(Numbers(4)), num_micro_batches=1, rank=0, size=1, device=None,
                dataloader_config=DataLoaderConfiguration(),
            )  # fmt: skip
        except TypeError as error:
            return str(error)


def test_several_processes_need_the_mesh():
    assert all("needs `mesh`" in text for text in run_ranks(without_mesh, 2, "dp4"))
