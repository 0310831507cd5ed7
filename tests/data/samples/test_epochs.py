"""Every sample once per epoch, in an order of seed and epoch; what fills a last batch counts for nothing."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.loader import Loader
from megalith.data.samples.epochs import Epochs, OneEpoch


class Numbers:
    """Samples are their numbers."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"number": np.array(index), "loss_mask": np.ones(2, np.float32)}


@settings(deadline=None)
@given(
    length=st.integers(1, 12), epochs=st.integers(1, 3), micro=st.integers(1, 3), accumulated=st.integers(1, 2),
    ranks=st.integers(1, 3), consumed=st.integers(0, 3),
)  # fmt: skip
def test_each_epoch_has_every_sample_once_whatever_reads_it(length, epochs, micro, accumulated, ranks, consumed):
    """consumed: batches of one sample that were read before."""
    batch, total = micro * accumulated * ranks, length * epochs
    consumed = min(consumed, total)
    dataset = Epochs(Numbers(length), total, seed=7, padding=batch - 1)
    seen = [int(dataset[at]["number"]) for at in range(consumed)]
    for first in range(consumed, total, batch):
        read: dict[int, int | None] = {}
        for rank in range(ranks):
            loader = Loader(dataset, micro_batch_size=micro, rank=rank, size=ranks, num_workers=0)
            for part in loader.step(first, batch):
                counts = part["loss_mask"].bool().all(dim=1).tolist()
                assert part["loss_mask"].bool().any(dim=1).tolist() == counts
                rows = zip(part["samples"].tolist(), part["number"].tolist(), counts)
                read |= {sample: number if counted else None for sample, number, counted in rows}
        assert sorted(read) == list(range(first, first + batch))
        seen += [number for _, number in sorted(read.items()) if number is not None]
    assert len(seen) == total
    for epoch in range(epochs):
        part = seen[epoch * length : (epoch + 1) * length]
        assert sorted(part) == list(range(length)) and part == dataset.order(epoch).tolist()


def test_orders_differ_by_epoch_and_by_seed():
    orders = [Epochs(Numbers(50), 100, seed=seed).order(epoch).tolist() for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@settings(deadline=None)
@given(length=st.integers(1, 12), batch=st.integers(1, 5))
def test_a_validation_dataset_is_read_whole(length, batch):
    dataset = OneEpoch(Numbers(length), batch)
    assert len(dataset) == dataset.batches * batch < length + batch
    counted = [int(dataset[at]["number"]) for at in range(len(dataset)) if dataset[at]["loss_mask"].any()]
    assert counted == list(range(length))
