"""Indices of GPT samples: golden vectors, and equality with the plain loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import DataError
from megalith.data.samples import gpt_index

SIZES = np.array([5, 3, 8, 2, 7, 4], np.int32)


def indices(num_samples, sizes=SIZES, seq_length=4, seed=1234):
    plan = gpt_index.plan(0, len(sizes), int(sizes.sum()), num_samples, seq_length, seed)
    return plan, *gpt_index.build(plan, sizes)


def loop(documents, lengths, seq_length, samples):
    """The sample index token by token: rows (index into documents, offset)."""
    rows, index, offset = [[0, 0]], 0, 0
    for _ in range(samples):
        remaining = seq_length + 1
        while remaining:
            length = lengths[documents[index]] - offset
            remaining -= length
            if remaining <= 0:
                offset += remaining + length - 1
                remaining = 0
            else:
                index, offset = index + 1, 0
        rows.append([index, offset])
    return np.array(rows)


def test_golden_one_epoch():
    plan, documents, samples, order = indices(5)
    assert plan.epochs == 1 and documents.tolist() == [2, 1, 5, 0, 4, 3]
    assert samples.tolist() == [[0, 0], [0, 4], [1, 0], [2, 1], [3, 1], [4, 0], [4, 4], [5, 1]]
    assert order.tolist() == [5, 0, 3, 4, 2, 6, 1] and (documents.dtype, samples.dtype, order.dtype) == (
        np.int32,
        np.int32,
        np.uint32,
    )


def test_golden_last_epoch_apart():
    plan, documents, samples, order = indices(9)
    assert plan.epochs == 2 and plan.separate and documents.tolist() == [2, 1, 5, 0, 4, 3, 0, 4, 3, 2, 5, 1]
    assert samples[7:].tolist() == [[5, 1], [6, 3], [7, 2], [7, 6], [9, 1], [9, 5], [10, 1], [11, 1]]
    assert order.tolist() == [1, 0, 3, 2, 5, 4, 6, 9, 10, 12, 8, 11, 13, 7]


def test_golden_two_epochs_together():
    plan, documents, samples, order = indices(13)
    assert plan.epochs == 2 and not plan.separate and documents.tolist() == [1, 2, 5, 2, 3, 4, 1, 0, 4, 5, 0, 3]
    assert samples.tolist() == [
        [0, 0],
        [1, 1],
        [1, 5],
        [2, 1],
        [3, 1],
        [3, 5],
        [4, 1],
        [5, 3],
        [6, 0],
        [7, 1],
        [8, 0],
        [8, 4],
        [9, 1],
    ] + [
        [10, 1],
        [11, 0],
    ]
    assert order.tolist() == [7, 11, 2, 3, 1, 9, 5, 4, 0, 8, 6, 10, 13, 12]


def test_what_legacy_asserted_away():
    """11 tokens an epoch, 5 samples of 4: the last epoch gives more than a whole one.

    Megatron of 2022 stopped there, core does not.
    """
    plan, *_ = indices(5, np.array([11], np.int32))
    assert (plan.epochs, plan.samples, plan.separate) == (2, 5, False)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any),
    st.integers(1, 25),
    st.integers(1, 60),
    st.integers(0, 2**32 - 1),
    st.integers(1, 50),
)
@settings(max_examples=200, deadline=None)
def test_equal_to_the_loop(sizes, seq_length, num_samples, seed, block):
    sizes = np.array(sizes, np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_index, "BLOCK", block)
        plan, documents, samples, order = indices(num_samples, sizes, seq_length, seed)
    total = plan.epochs * plan.tokens
    assert total >= num_samples * seq_length + 1 > total - plan.tokens or plan.epochs == 1
    assert plan.samples == (total - 1) // seq_length >= num_samples
    assert np.array_equal(samples, loop(documents, sizes, seq_length, plan.samples))
    assert sorted(order) == list(range(plan.samples)) and sorted(order[: plan.whole]) == list(range(plan.whole))
    assert np.array_equal(np.bincount(documents, minlength=len(sizes)), np.full(len(sizes), plan.epochs))


def test_equal_to_megatron_core():
    from megatron.core.datasets import helpers_cpp as helpers

    random = np.random.default_rng(3)
    for seq_length, most in ((7, 12), (64, 40), (5, 300)):
        lengths = random.integers(0, most, 5000, dtype=np.int32)
        plan, documents, samples, _ = indices(int(1.7 * lengths.sum()) // seq_length, lengths, seq_length)
        assert np.array_equal(
            samples, helpers.build_sample_idx_int32(lengths, documents, seq_length, plan.epochs, plan.tokens, True, 1)
        )


def test_nothing_to_cut_is_named():
    with pytest.raises(DataError, match="no tokens"):
        gpt_index.plan(0, 3, 0, 10, 8, 1)
    with pytest.raises(DataError, match="hold 8 tokens; one sample takes 9"):
        gpt_index.plan(0, 3, 8, None, 8, 1)
    assert gpt_index.plan(0, 3, 8, 2, 8, 1).epochs == 3
