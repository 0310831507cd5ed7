"""Sample mappings: golden vectors, and equality with the compiled originals and with a plain loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import DataError
from megalith.data.samples.sample_mapping import build_blocks, build_mapping

DOCUMENTS, LENGTHS = np.array([0, 4, 5, 9, 12]), np.array([6, 5, 7, 3, 9, 4, 4, 600, 2, 10, 8, 6], np.int32)


def mapping(min_sentences, **changes):
    options = {"num_samples": 6, "max_length": 12, "short_prob": 0.1, "seed": 1234, **changes}
    return build_mapping(DOCUMENTS, LENGTHS, min_sentences=min_sentences, **options)


def test_golden():
    assert mapping(2).tolist() == [[9, 12, 12], [9, 12, 12], [0, 4, 12], [0, 4, 12], [0, 4, 12], [9, 12, 12]]
    assert mapping(1).tolist() == [[9, 12, 12], [4, 5, 12], [0, 4, 12], [9, 12, 12], [4, 5, 12], [0, 4, 12]]


def test_golden_blocks():
    documents, lengths = np.array([0, 3, 6, 8, 10]), np.array([10, 20, 30, 15, 12, 9, 8, 25, 40, 5], np.int32)
    options = {"num_samples": None, "max_length": 40, "seed": 1234}
    blocks = build_blocks(documents, lengths, np.array([3, 2, 1, 4]), **options)
    assert blocks.tolist() == [[6, 8, 2, 2], [0, 3, 0, 0], [3, 6, 1, 1], [8, 10, 3, 3]]
    blocks = build_blocks(documents, lengths, np.array([3, 2, 1, 4]), one_sentence=True, **options)
    assert blocks.tolist() == [[3, 6, 1, 1], [0, 3, 0, 0], [6, 8, 2, 2], [9, 10, 3, 4], [8, 9, 3, 3]]


CASE = st.tuples(
    st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(lambda counts: max(counts) > 2),
    st.integers(0, 2**30),
    st.integers(1, 60),
    st.integers(3, 40),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(1, 2**31 - 2),
)


@given(CASE, st.sampled_from([1, 2]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_equal_to_the_compiled_originals(case, minimum, some_long):
    from megatron.core.datasets import helpers_cpp as helpers

    counts, noise, num_samples, max_length, short, seed = case
    random = np.random.default_rng(noise)
    documents = np.concatenate(([0], np.cumsum(counts)))
    lengths = random.integers(0, 20, documents[-1], dtype=np.int32)
    if some_long:
        lengths[random.integers(0, documents[-1])] = 600
    titles = random.integers(0, 5, len(counts), dtype=np.int32)
    options = {"max_length": max_length, "seed": seed}
    for wanted in (num_samples, None):
        epochs, most = (1, 2**62) if wanted is None else (2**31 - 2, wanted)
        try:
            rows = build_mapping(
                documents, lengths, num_samples=wanted, short_prob=short, min_sentences=minimum, **options
            )
        except DataError:
            continue  # the original would walk through 2^31 empty epochs
        assert np.array_equal(
            rows, helpers.build_mapping(documents, lengths, epochs, most, max_length, short, seed, False, minimum)
        )
    try:
        rows = build_blocks(documents, lengths, titles, num_samples=num_samples, one_sentence=minimum == 1, **options)
    except DataError:
        return
    expected = helpers.build_blocks_mapping(
        documents, lengths, titles, 2**31 - 2, num_samples, max_length, seed, False, minimum == 1
    )
    assert np.array_equal(rows, expected)


def test_nothing_usable_is_named():
    with pytest.raises(DataError, match="no document can give a sample"):
        build_mapping(
            np.array([0, 1]), np.array([5]), num_samples=3, max_length=9, short_prob=0.1, seed=1, min_sentences=2
        )
