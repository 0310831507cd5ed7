"""torch's DataLoaders in a layout, its processes simulated one by one: which samples each gets, and in which order."""

import itertools
import math
import random
import re

import pytest
import torch
from accelerate import skip_first_batches as accelerate_skip
from accelerate.data_loader import prepare_data_loader
from accelerate.state import GradientState
from accelerate.utils import DataLoaderConfiguration
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SubsetRandomSampler
from torch.utils.data import WeightedRandomSampler as Weighted

from megalith.common.errors import ConfigError, DataError
from megalith.integrations.accelerate.data import (
    MegatronDataLoader,
    MegatronLMDummyDataLoader,
    micro_batch_size_of,
    prepare_loader,
    skip_first_batches,
)
from tests.integrations.accelerate.helpers import accelerating


@pytest.fixture(autouse=True)
def clean():
    with accelerating():
        yield


class Numbers(Dataset):
    """Sample i is {"number": i}; lists of numbers are fetched at once."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"number": torch.tensor(index)}


class Stream(IterableDataset):
    """The numbers below `size`, each worker's share of them."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter({"number": torch.tensor(number)} for number in range(first, self.size, step))


class SizedStream(Stream):
    """A stream that knows its length."""

    def __len__(self):
        return self.size


class Buckets(BatchSampler):
    """Batches of its own, in an order drawn from Python's generator each epoch."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(random.sample(self.batches, len(self.batches)))

    def __len__(self):
        return len(self.batches)


def prepared(loader, number=1, rank=0, size=1, **options) -> MegatronDataLoader:
    config = DataLoaderConfiguration(**options)
    return prepare_loader(
        loader, num_micro_batches=number, rank=rank, size=size, device=None, dataloader_config=config,
        rng_types=["generator"],
    )  # fmt: skip


def numbers(loader) -> list[list[int]]:
    """The samples of each batch of an epoch."""
    return [batch["number"].tolist() for batch in loader]


def of_all_ranks(make, number, size, epochs=1, **options) -> list[list[int]]:
    """The samples of each global batch, in the order of the ranks, without repeated ones.

    make: makes the script's loader, in each simulated process anew with the same seeds.
    """
    ranks = []
    for rank in range(size):
        torch.manual_seed(5)
        random.seed(5)
        loader = prepared(make(), number, rank, size, **options)
        batches = []
        for _ in range(epochs):
            for batch in loader:
                mine = batch["number"].tolist()
                batches.append((mine[: len(mine) - loader.repeated], loader.remainder))
        ranks.append(batches)
    joined = [[one for mine, _ in parts for one in mine] for parts in zip(*ranks, strict=True)]
    for parts, batch in zip(zip(*ranks), joined):
        assert {remainder for _, remainder in parts} <= {-1, 0, len(batch)}
    return joined


def in_one_process(make, batch_size, epochs=1) -> list[list[int]]:
    """The batches of torch's own loader, of batch_size samples."""
    torch.manual_seed(5)
    random.seed(5)
    loader = make(batch_size)
    return [batch for _ in range(epochs) for batch in numbers(loader)]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 5), st.integers(1, 3), st.sampled_from((1, 2, 4)), st.booleans(), st.booleans(),
    st.sampled_from((Numbers, Stream, SizedStream)),
)  # fmt: skip
def test_the_union_over_ranks_is_the_data_in_order(length, batch, number, size, drop_last, even, kind):
    def make(batch_size):
        return DataLoader(kind(length), batch_size=batch_size, drop_last=drop_last)

    whole = batch * number * size
    expected = in_one_process(make, whole)
    if not even and not drop_last and 0 < length % whole < size:
        with pytest.raises(DataError, match="even_batches=True"):
            of_all_ranks(lambda: make(batch), number, size, even_batches=False)
        return
    assert of_all_ranks(lambda: make(batch), number, size, even_batches=even) == expected


@pytest.mark.parametrize(
    ("number", "size", "workers"), [(1, 1, 0), (2, 1, 2), (1, 2, 2), (2, 2, 0), (1, 4, 0)]
)  # fmt: skip
def test_shuffled_order_is_that_of_one_process(number, size, workers):
    def make(batch_size):
        return DataLoader(
            Numbers(41), batch_size=batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )

    expected = in_one_process(make, 3 * number * size, epochs=2)
    assert expected[0] != sorted(expected[0])
    assert of_all_ranks(lambda: make(3), number, size, epochs=2) == expected


def weighted(batch_size):
    return DataLoader(Numbers(20), batch_size=batch_size, sampler=Weighted(torch.arange(1.0, 21.0), 20))


def subset(batch_size):
    return DataLoader(Numbers(20), batch_size=batch_size, sampler=SubsetRandomSampler(range(3, 16)))


def seeded(batch_size):
    return DataLoader(Numbers(20), batch_size, shuffle=True, generator=torch.Generator().manual_seed(9))


def own_batches(batch_size):
    return DataLoader(Numbers(20), batch_sampler=BatchSampler(range(19, -1, -1), batch_size, False))


def lists(batch_size):
    return DataLoader(Numbers(20), sampler=BatchSampler(range(20), batch_size, False), batch_size=None)


@pytest.mark.parametrize("make", [weighted, subset, seeded, own_batches, lists])
def test_samplers(make):
    expected = in_one_process(make, 8, epochs=2)
    assert of_all_ranks(lambda: make(2), 2, 2, epochs=2) == expected


def test_batches_of_varying_size_are_joined():
    batches = [[0, 1], [2], [3, 4, 5], [6, 7], [8]]
    found = of_all_ranks(lambda: DataLoader(Numbers(9), batch_sampler=Buckets(batches)), 1, 2)
    random.seed(5)
    order = random.sample(batches, 5)
    assert found == [order[0] + order[1], order[2] + order[3], order[4]]


def test_numbers_of_the_guide():
    loader = prepared(DataLoader(Numbers(2318), batch_size=24), 2)
    assert len(loader) == 49 and math.ceil(2318 / 48) == 49
    assert (loader.micro_batch_size, loader.total_batch_size) == (24, 48)
    assert len(prepared(DataLoader(Numbers(2318), batch_size=24, drop_last=True), 2)) == 48
    assert len(prepared(DataLoader(SizedStream(2318), batch_size=24), 2)) == 49


def test_the_last_batch_repeats_as_few_samples_as_possible():
    parts = [prepared(DataLoader(Numbers(11), batch_size=4), 1, rank, 2) for rank in range(2)]
    for loader, last, repeated in zip(parts, ([8, 9], [10, 8]), (0, 1)):
        iterator = iter(loader)
        assert len(next(iterator)["number"]) == 4 and loader.gradient_state.remainder == -1
        assert not loader.gradient_state.end_of_dataloader
        assert next(iterator)["number"].tolist() == last
        assert loader.gradient_state.end_of_dataloader and loader.gradient_state.remainder == 3
        assert loader.repeated == repeated
        assert next(iterator, None) is None and not GradientState().in_dataloader


def test_one_process_has_a_smaller_last_batch():
    assert numbers(prepared(DataLoader(Numbers(5), batch_size=2), 2)) == [[0, 1, 2, 3], [4]]


def test_a_loop_that_is_left_early_leaves_no_active_loader():
    loader = prepared(DataLoader(Numbers(9), batch_size=2))
    for _ in loader:
        assert GradientState().active_dataloader is loader
        break
    assert not GradientState().in_dataloader
    assert numbers(loader)[0] == [0, 1]


def test_options_are_kept():
    def collate(samples):
        return {"number": torch.stack([each["number"] for each in samples]) + 100}

    given = DataLoader(Numbers(6), 2, collate_fn=collate, num_workers=1, timeout=60, prefetch_factor=3)
    loader = prepared(given, 2)
    assert (loader.num_workers, loader.timeout, loader.prefetch_factor, loader.pin_memory) == (1, 60, 3, False)
    assert numbers(loader) == [[100, 101, 102, 103], [104, 105]]
    assert isinstance(loader, DataLoader) and loader.dataset is given.dataset
    assert prepared(loader) is loader
    other = prepare_data_loader(DataLoader(Numbers(4)), num_processes=1, process_index=0)
    assert prepared(other) is other


def test_epochs_are_told_to_samplers_and_datasets():
    told = {"samples": set(), "batches": set()}

    class Told(Numbers):
        def set_epoch(self, epoch):
            told["samples"].add(epoch)

    class ToldBatches(Buckets):
        def set_epoch(self, epoch):
            told["batches"].add(epoch)

    loader = prepared(DataLoader(Told(4), batch_sampler=ToldBatches([[0, 1], [2, 3]])))
    for _ in range(3):
        numbers(loader)
    assert told == {"samples": {0, 1, 2}, "batches": {0, 1, 2}}


def test_seedable_sampler_is_accelerates():
    def make(batch_size):
        return DataLoader(Numbers(17), batch_size=batch_size, shuffle=True)

    torch.manual_seed(5)
    theirs = prepare_data_loader(make(8), num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=3)
    expected = numbers(theirs) + numbers(theirs)
    assert of_all_ranks(lambda: make(4), 1, 2, epochs=2, use_seedable_sampler=True, data_seed=3) == expected


def test_dispatched_batches_are_the_same():
    for make in (lambda: DataLoader(Numbers(11), 2), lambda: DataLoader(Stream(11), 2)):
        for dispatch in (True, False):
            found = of_all_ranks(make, 1, 2, dispatch_batches=dispatch)
            assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize("make", [Numbers, SizedStream])
def test_first_batches_are_skipped(make):
    loader = prepared(DataLoader(make(11), batch_size=2), 2)
    whole = numbers(loader)
    skipped = skip_first_batches(loader, 1)
    assert numbers(skipped) == whole[1:] and len(skipped) == 2 and len(loader) == 3
    assert numbers(skip_first_batches(skipped, 1)) == whole[2:]
    assert numbers(skip_first_batches(loader, 3)) == [] and numbers(loader) == whole
    if make is Numbers:
        assert numbers(accelerate_skip(loader, 1)) == whole[1:]
    assert numbers(skip_first_batches(DataLoader(Numbers(3)), 1)) == [[1], [2]]


@pytest.mark.parametrize(("sizes", "by_itself"), [((1, 4), False), ((4, 1), True)])
def test_an_interrupted_epoch_is_resumed_in_another_layout(sizes, by_itself):
    """Three epochs of twelve global batches; interrupted after five batches of the second, by another process."""

    def loaders(size):
        made = []
        for rank in range(size):
            loader = DataLoader(Numbers(45), batch_size=4 // size, shuffle=True)
            made.append(prepared(loader, 1, rank, size, use_stateful_dataloader=by_itself))
        return made

    def epoch(found, count=None):
        state = torch.get_rng_state()
        parts = []
        for loader in found:
            torch.set_rng_state(state)  # of simulated processes, which have each their own
            parts.append([
                batch["number"].tolist()[: 4 // len(found) - loader.repeated]
                for batch in itertools.islice(loader, count)
            ])  # fmt: skip
        return [[one for part in batch for one in part] for batch in zip(*parts, strict=True)]

    torch.manual_seed(1)
    whole = loaders(1)
    expected = [epoch(whole) for _ in range(3)]
    torch.manual_seed(1)
    first = loaders(sizes[0])
    assert epoch(first) == expected[0] and epoch(first, 5) == expected[1][:5]
    states, random_state = [each.state_dict() for each in first], torch.get_rng_state()
    assert {state["epoch"] for state in states} == {1} and {state["batches"] for state in states} == {5}
    torch.manual_seed(77)
    second = loaders(sizes[1])
    for loader in second:
        loader.load_state_dict(states[0])
    torch.set_rng_state(random_state)  # as Accelerate's load_state does
    rest = second if by_itself else [skip_first_batches(loader, 5) for loader in second]
    assert epoch(rest) == expected[1][5:]
    assert epoch(second) == expected[2]
    assert second[0].state_dict()["epoch"] == 3 and second[0].state_dict()["batches"] == 0


def test_at_the_last_batch_the_epoch_is_done():
    loader = prepared(DataLoader(Numbers(6), batch_size=2, shuffle=True))
    for _ in loader:
        state = loader.state_dict()
    assert (state["epoch"], state["batches"]) == (1, 0) and set(state["random"]) == {"generators"}


def test_states_are_plain_enough_for_weights_only(tmp_path):
    loader = prepared(seeded(2))
    next(iter(loader))
    torch.save(loader.state_dict(), tmp_path / "state")
    again = prepared(seeded(2))
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert numbers(again) == numbers(prepared(seeded(2)))


def test_a_generator_of_its_own_is_resumed_between_epochs():
    loader = prepared(seeded(4))
    first, second, third = (numbers(loader) for _ in range(3))
    assert len({str(each) for each in (first, second, third)}) == 3
    loader = prepared(seeded(4))
    numbers(loader)
    state = loader.state_dict()
    again = prepared(seeded(4))
    again.load_state_dict(state)
    assert numbers(again) == second and numbers(again) == third


def test_what_cannot_be_kept_is_an_error():
    loader = DataLoader(Numbers(4), batch_size=2)
    with pytest.raises(ConfigError, match=r"split_batches=\.\.\.\) must be False.*divide batch_size by 4"):
        prepared(loader, 2, 0, 2, split_batches=True)
    with pytest.raises(ConfigError, match=r"found batch_size=None\. Give it a batch_size"):
        prepared(DataLoader(Numbers(4), batch_size=None))
    with pytest.raises(ConfigError, match="found a dataset that gives whole batches"):
        prepared(DataLoader(Stream(4), batch_size=None))
    with pytest.raises(ConfigError, match="dispatch_batches"):
        prepared(lists(2), 1, 0, 2, dispatch_batches=True)


def test_micro_batch_size():
    train, valid = DataLoader(Numbers(4), batch_size=3), DataLoader(Numbers(4), batch_size=2)
    assert micro_batch_size_of([train], True) == (3, [])
    assert micro_batch_size_of([train, prepared(train, 2)], True) == (3, [])
    for smallest, size in ((True, 2), (False, 3)):
        chosen, (line,) = micro_batch_size_of([train, valid], smallest)
        assert chosen == size and line.startswith("batch sizes of the loaders are 3, 2; each keeps its own")
    dummy = MegatronLMDummyDataLoader(micro_batch_size=5, data_path="x", seq_length=8)
    assert micro_batch_size_of([dummy], True) == (5, [])
    for nothing in ([], [DataLoader(Numbers(4), batch_sampler=Buckets([[1]]))]):
        with pytest.raises(ConfigError, match=re.escape("You must specify a training or evaluation dataloader")):
            micro_batch_size_of(nothing, True)


def test_an_empty_dataset_gives_nothing():
    assert numbers(prepared(DataLoader(Numbers(0), batch_size=2), 2, 1, 2)) == []
    assert numbers(prepared(DataLoader(Stream(0), batch_size=2), 2, 1, 2)) == []
