"""Blending: Megatron's rule, bit for bit, whatever the way it is computed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.samples import blend
from megalith.data.samples.blend import blend_index, exhaustive_index, requested_samples


def loop(weights, size, left=None):
    """The rule sample by sample; `left`: samples that each source has (the exhaustive variant)."""
    shares = np.array(weights, np.float64)
    shares = shares / shares.sum()
    counts, sources, numbers = [0] * len(shares), [], []
    for index in range(size):
        errors = [share * max(float(index), 1.0) - count for share, count in zip(shares, counts)]
        possible = [j for j in range(len(shares)) if shares[j] > 0 and (left is None or counts[j] < left[j])]
        best = max(possible, key=lambda j: (errors[j], -j))
        sources.append(best)
        numbers.append(counts[best])
        counts[best] += 1
    return sources, numbers


def located(index):
    pairs = [index.locate(number) for number in range(len(index))]
    return [source for source, _ in pairs], [number for _, number in pairs]


def test_golden():
    assert located(blend_index([0.3, 0.7], 12)) == (
        [1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1],
        [0, 0, 1, 2, 1, 3, 4, 2, 5, 6, 3, 7],
    )
    assert located(blend_index([0.2, 0.3, 0.5], 12))[0] == [2, 1, 0, 2, 1, 2, 0, 2, 1, 2, 0, 2]
    assert located(blend_index([1, 1], 6))[0] == [0, 1, 0, 1, 0, 1]


WEIGHTS = st.one_of(
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=24),
    st.lists(st.integers(1, 4), min_size=1, max_size=24),  # many ties
    st.lists(st.sampled_from([1.0, 1e-5, 0.5, 1e-9]), min_size=1, max_size=24),  # extreme
)


@given(
    WEIGHTS,
    st.integers(1, 400),
    st.sampled_from([(4, 0, 4, 3), (16, 8, 8, 4), (4, 16, 4, 24), (8, 3, 5, 6)]),
    st.integers(1, 200),
)
@settings(max_examples=150, deadline=None)
def test_equal_to_the_loop(weights, size, constants, matrix):
    """Tiny strides and windows, so that stretches disagree and are repaired, and windows are doubted."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("STRIDE", "OVERLAP", "WINDOW", "CANDIDATES"), constants):
            patch.setattr(blend, name, value)
        patch.setattr(blend, "MATRIX_COUNTS", matrix)
        index = blend_index(weights, size)
        sources, numbers = loop(weights, size)
        assert index.sources.tolist() == sources and located(index) == (sources, numbers)
        for at in {0, 1, size // 2, size - 1}:
            assert index.counts_before(at).tolist() == np.bincount(sources[:at], minlength=len(weights)).tolist()


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any))
@settings(max_examples=40, deadline=None)
def test_exhaustive_takes_everything_once(sizes):
    index = exhaustive_index(sizes)
    assert located(index) == loop(sizes, sum(sizes), sizes)
    assert index.counts_before(len(index)).tolist() == sizes


@given(WEIGHTS, st.integers(1, 2000))
@settings(max_examples=25, deadline=None)
def test_no_source_is_taken_more_than_a_sample_beyond_its_share(weights, size):
    index = blend_index(weights, size)
    shares = blend.normalize(weights)
    assert (index.counts_before(size) <= shares * size + 1 + 1e-9).all()


@pytest.mark.parametrize("sources", [3, 200, 400])
def test_equal_to_megatron_core(sources):
    from megatron.core.datasets import helpers_cpp as helpers

    weights = np.random.default_rng(sources).pareto(1.0, sources) + 1e-4
    shares, size = blend.normalize(weights), 60_000
    expected, numbers = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(expected, numbers, shares, sources, size, False)
    index = blend_index(weights, size)
    assert np.array_equal(index.sources, expected)
    assert all(index.locate(at) == (expected[at], numbers[at]) for at in range(0, size, 977))
    left = index.counts_before(5000)
    left = left[left > 0]  # the original loops for ever on an empty source
    expected, numbers = np.zeros(left.sum(), np.int16), np.zeros(left.sum(), np.int64)
    helpers.build_exhaustive_blending_indices(expected, numbers, left, left.size)
    assert np.array_equal(exhaustive_index(left).sources, expected)


def test_requests_as_megatron_rounds_them():
    assert [requested_samples(1000, share) for share in (0.3, 0.7, 0.0001)] == [302, 704, 2]
    assert [requested_samples(1000, share, "legacy") for share in (0.3, 0.7, 0.0001)] == [302, 704, 1]
    assert blend_index([0, 3, 0, 1], 4).sources.tolist() == [1, 1, 1, 3] or blend_index([0, 3, 0, 1], 4).counts_before(
        4
    ).tolist() == [0, 3, 0, 1]


def test_a_large_blend_is_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(blend, "CACHED_SIZE", 10)
    first = blend_index([1, 2], 5000, [tmp_path])
    monkeypatch.setattr(blend, "_build", None)
    again = blend_index([1, 2], 5000, [tmp_path])
    assert np.array_equal(first.sources, again.sources) and len(list(tmp_path.iterdir())) == 2
    assert located(again) == loop([1, 2], 5000)
