"""Packing: every sample once an epoch, no row too long, few rows, and an order of (seed, epoch)."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.instructions.packing import Packer, best_fit

CASES = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@settings(deadline=None)
@given(CASES, st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_every_sample_is_in_one_row_of_each_epoch_and_rows_are_not_too_long(lengths, seed, epoch):
    for pack in (True, False):
        packer = Packer(np.array(lengths), 50, seed, pack=pack)
        packing = packer.epoch(epoch)
        rows = [packing.row(number) for number in range(packer.num_rows)]
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
        assert all(0 < sum(lengths[i] for i in row) <= 50 for row in rows)
        assert pack or packer.num_rows == len(lengths)


@settings(deadline=None)
@given(CASES)
def test_rows_are_few(lengths):
    """Of two rows that are half empty one would do, so there is at most one."""
    falling = np.sort(lengths)[::-1]
    rows = best_fit(falling, 50)
    filled = np.bincount(rows, falling)
    assert -(-sum(lengths) // 50) <= len(filled) and (2 * filled <= 50).sum() <= 1


def test_epochs_differ_in_rows_and_order_and_are_the_same_each_time():
    lengths = np.random.RandomState(0).randint(1, 30, 400)
    packer = Packer(lengths, 64, 7)
    first, again, second = (Packer(lengths, 64, 7).epoch(0), packer.epoch(0), packer.epoch(1))
    assert np.array_equal(first.samples, again.samples) and np.array_equal(first.ends, again.ends)
    rows = [{tuple(sorted(packing.row(i))) for i in range(packer.num_rows)} for packing in (first, second)]
    assert len(rows[0] & rows[1]) < 0.1 * packer.num_rows
    assert not np.array_equal(Packer(lengths, 64, 8).epoch(0).samples, first.samples)


def test_usual_lengths_fill_rows():
    lengths = np.clip(np.random.RandomState(0).lognormal(5, 0.8, 5000), 8, 2048).astype(int)
    packer = Packer(lengths, 2048, 0)
    assert lengths.sum() / (packer.num_rows * 2048) > 0.99
