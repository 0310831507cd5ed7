"""The loader: every rank its own part of one global order, and nothing but a number to remember."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import ConfigError
from megalith.data.loader import Loader


class Numbers:
    """Sample i is the number i."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"input_ids": np.full(3, index), "loss_mask": np.ones(3, np.float32)}


def read(size, order="single", total=96, batch=24, micro=2, consumed=0, steps=3, workers=0):
    """The samples of every step, in the order of the batch: micro-batch by micro-batch, rank by rank."""
    loaders = [
        Loader(Numbers(total), micro_batch_size=micro, rank=rank, size=size, order=order, num_workers=workers)
        for rank in range(size)
    ]
    result = []
    for step in range(steps):
        parts = [loader.step(consumed + step * batch, batch) for loader in loaders]
        result.append([int(row[0]) for group in zip(*parts) for part in group for row in part["input_ids"]])
        numbers = [int(number) for group in zip(*parts) for part in group for number in part["samples"]]
        assert numbers == list(range(consumed + step * batch, consumed + (step + 1) * batch))
    for loader in loaders:
        loader.close()
    return result


@given(st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2]), st.sampled_from([0, 24, 48]), st.sampled_from([0, 2]))
@settings(max_examples=20, deadline=None)
def test_one_order_whatever_the_ranks(size, micro, consumed, workers):
    steps = (96 - consumed) // 24
    expected = [list(range(consumed + 24 * step, consumed + 24 * (step + 1))) for step in range(steps)]
    assert read(size, micro=micro, consumed=consumed, steps=steps, workers=workers) == expected
    cyclic = read(1, "cyclic", total=50, micro=1, steps=6)
    assert (
        read(size, "cyclic", total=50, micro=micro, consumed=consumed, steps=2, workers=workers)
        == cyclic[consumed // 24 :][:2]
    )


def test_cyclic_takes_every_sample_once_an_epoch():
    flat = [number for step in read(2, "cyclic", total=48, steps=4) for number in step]
    assert sorted(flat[:48]) == sorted(flat[48:]) == list(range(48)) and flat[:48] != flat[48:]
    assert flat[:48] == torch.randperm(48, generator=torch.Generator().manual_seed(1234)).tolist()


def test_what_a_batch_holds():
    with_threads = Loader(Numbers(20), micro_batch_size=2, rank=1, size=2)
    first, second = with_threads.step(0, 8)
    assert first["input_ids"].tolist() == [[2] * 3, [3] * 3] and second["samples"].tolist() == [6, 7]
    assert first["input_ids"].dtype == torch.int64 and first["loss_mask"].dtype == torch.float32
    assert [part["samples"].tolist() for part in with_threads.step(8, 4)] == [[10, 11]]  # not what was read ahead
    with_threads.step(12, 8)
    with pytest.raises(IndexError, match="dataset of 20"):
        with_threads.step(20, 8)
    with_threads.close()


@pytest.mark.parametrize("batch, near", [(13, "12 or 18"), (3, "6"), (0, "6")])
def test_an_indivisible_batch_is_refused(batch, near):
    with pytest.raises(ConfigError, match=f"Write --global-batch-size {near}"):
        Loader(Numbers(20), micro_batch_size=2, rank=0, size=3, num_workers=0).step(0, batch)
    with pytest.raises(ConfigError, match="single or cyclic"):
        Loader(Numbers(20), micro_batch_size=2, order="random")
