"""AttentionMask: its bias block by block is the whole bias, and holds what the description says."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.layers.mask import AttentionMask
from megalith.layers.positions import alibi_slopes

CPU = torch.device("cpu")


@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(1, 12),
    st.integers(0, 9),
    st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_blocks_are_parts_of_the_whole(
    causal: bool, alibi: bool, documents: bool, padding: bool, window: int | None, start: int, size: int
) -> None:
    mask = AttentionMask(
        causal=causal,
        slopes=alibi_slopes(3) if alibi else None,
        documents=torch.tensor([[0] * 4 + [1] * 6, [0] * 9 + [1]]) if documents else None,
        padding=torch.tensor([[True] * 10, [True] * 6 + [False] * 4]) if padding else None,
        window=window,
    )
    whole = mask.bias(slice(0, 10), slice(0, 10), CPU).expand(2, 3, 10, 10)
    stop = min(10, start + size)
    for keys in (slice(0, stop), slice(start, stop)):
        part = mask.bias(slice(start, stop), keys, CPU).expand(2, 3, stop - start, keys.stop - keys.start)
        assert torch.equal(part, whole[:, :, start:stop, keys])
    assert mask.needs_no_bias == (not alibi and not documents and not padding and window is None)


def test_numbers() -> None:
    bias = AttentionMask(slopes=torch.tensor([0.5]), window=2).bias(slice(0, 3), slice(0, 3), CPU)[0, 0]
    minus = -math.inf
    assert bias.tolist() == [[0.0, minus, minus], [-0.5, 0.0, minus], [minus, -0.5, 0.0]]


def test_half_precision_slopes_keep_exact_distances() -> None:
    """A model cast to bfloat16 must not round distances to 8 bits."""
    slopes = torch.tensor([0.5], dtype=torch.bfloat16)
    bias = AttentionMask(slopes=slopes).bias(slice(1000, 1001), slice(0, 1001), CPU)
    assert bias.dtype == torch.float32
    assert torch.equal(bias.flatten(), 0.5 * (torch.arange(1001.0) - 1000))


@given(st.integers(1, 12), st.integers(0, 9), st.integers(1, 9), st.integers(0, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_relative_bias_is_that_of_each_distance(size: int, start: int, keys: int, more: int, causal: bool) -> None:
    """Any block of scores, from a table for as many distances as there are or more."""
    length = max(start + size, keys) + more
    table = torch.randn(2, 2 * length - 1, dtype=torch.float64)
    found = AttentionMask(causal=causal, relative=table).bias(slice(start, start + size), slice(0, keys), CPU)
    for query in range(size):
        for key in range(keys):
            distance = key - (start + query)
            wanted = (
                table[:, length - 1 + distance] if not causal or distance <= 0 else torch.full((2,), -math.inf).double()
            )
            assert torch.equal(found[0, :, query, key].double(), wanted)
