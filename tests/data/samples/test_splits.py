"""Splits: the golden vectors of both roundings."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.common.errors import ConfigError
from megalith.data.samples.splits import normal_split, split_bounds


@pytest.mark.parametrize(
    "split, size, legacy, core",
    [
        ("969,30,1", 12345, [0, 11963, 12333, 12345], [0, 11962, 12333, 12345]),
        ("1,1,1", 10, [0, 4, 7, 10], [0, 3, 7, 10]),
        ("1,1,1", 11, [0, 3, 7, 11], [0, 4, 7, 11]),
        ("949,50,1", 100, [0, 95, 100, 100], [0, 95, 100, 100]),
        ("949,50,1", 1000, [0, 949, 999, 1000], [0, 949, 999, 1000]),
        ("969, 30, 1", 100, [0, 97, 100, 100], [0, 97, 100, 100]),
        ("969/30/1", 7, [0, 7, 7, 7], [0, 7, 7, 7]),
        ("1", 5, [0, 5, 5, 5], [0, 5, 5, 5]),
    ],
)
def test_golden(split, size, legacy, core):
    for rounding, expected in (("legacy", legacy), ("core", core)):
        assert split_bounds(split, size, rounding) == list(itertools.pairwise(expected))


@pytest.mark.parametrize("split", ["", "0,0,0", "1,2,3,4", "-1,2,3", "1.2.3"])
def test_nonsense_is_refused(split):
    with pytest.raises(ConfigError, match="--split"):
        split_bounds(split, 10)


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any), st.integers(0, 10**9))
def test_core_covers_every_document_once(numbers, size):
    bounds = split_bounds(",".join(map(str, numbers)), size)
    assert bounds[0][0] == 0 and bounds[2][1] == size
    assert all(begin <= end for begin, end in bounds) and bounds[0][1] == bounds[1][0] and bounds[1][1] == bounds[2][0]


@pytest.mark.parametrize("split", ["969, 30, 1", "969,30,1", " 969/30/1", "969 30 1,"])
def test_a_split_is_one_however_it_is_spelled(split):
    assert normal_split(split) == "969,30,1"
