"""Overlapping windows of a long text: every token but the first is predicted once, with as much before it as can be."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megalith.evaluation.scoring import Sample


def windows(ids: np.ndarray, seq_length: int, stride: int) -> Iterator[Sample]:
    """Samples of at most `seq_length` inputs, `stride` tokens apart; of all but the first the last `stride` count.

    So a token has at least seq_length - stride before it, where the text does. Megatron's windows (--overlapping-eval,
    1 <= stride <= seq_length), without those at the end in which it counts nothing.
    """
    last = len(ids) - 1  # the last token that is predicted; the first one is not
    for start in range(0, max(last - seq_length, 0) + stride, stride):
        end = min(start + seq_length, last)
        scored = end if start == 0 else end - (start + seq_length - stride)
        if scored > 0:
            yield Sample(ids[start : end + 1], scored)


def count(length: int, seq_length: int, stride: int) -> int:
    """The number of windows of a text of `length` tokens."""
    return 0 if length < 2 else 1 + max(0, -(-(length - 1 - seq_length) // stride))
