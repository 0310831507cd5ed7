"""Which source each sample of a blend comes from: Megatron's error-minimising rule, to the last bit, in parallel.

Sample i goes to the source that is furthest behind its weight: the largest w_j * max(i, 1) - count_j in double
precision, the first of equals. That is a chain, in which each step depends on all before it. But two chains that start
from different counts meet within some tens of samples: where the two choose a and b, count_a - count'_a < count_b -
count'_b, so the distance of the counts never grows. So the range is cut into segments that start, a little early, from
the counts expected there, and run side by side as rows of a matrix; a segment whose start is not the end of the one
before it is run again from there, until all agree. The result is therefore the chain itself, not an approximation.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np

from megalith.data.samples.index_cache import cache_key, load_or_build

STRIDE = 4096  # samples between two stored rows of counts
OVERLAP = 1024  # samples by which a segment starts early
WINDOW = 64  # steps for which the candidates are selected once, where sources are many
CANDIDATES = 104  # sources that can be chosen during a window
MATRIX_COUNTS = 40_000  # counts in a matrix: what a step touches stays in the CPU cache
NARROW_WIDTH = 64  # sources; below it a row of counts is short
CACHED_SIZE = 1 << 22  # blends of more samples than this are kept in the index cache


def normalize(weights) -> np.ndarray:
    """Weights that sum to 1, float64, as Megatron normalizes them."""
    weights = np.array(weights, np.float64)
    return weights / np.sum(weights)


def requested_samples(size: int, weight: float, rounding: str = "core") -> int:
    """Samples that Megatron asks of a source of this normalized weight for a blend of `size`, with 0.5 % to spare."""
    return math.ceil(math.ceil(size * weight) * (1 + 0.005)) if rounding == "core" else math.ceil(size * weight * 1.005)


@dataclasses.dataclass(frozen=True)
class BlendIndex:
    """sources [size]: the source of each sample.

    counts [size // STRIDE + 1, sources]: samples of each source before every STRIDE-th one.
    """

    sources: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        """Samples of the blend."""
        return self.sources.size

    def locate(self, index: int) -> tuple[int, int]:
        """(source, number of the sample within that source) of sample `index`."""
        source = self.sources.item(index)
        row, begin = index // STRIDE, index - index % STRIDE
        return source, self.counts.item(row, source) + int(np.count_nonzero(self.sources[begin:index] == source))

    def counts_before(self, index: int) -> np.ndarray:
        """Samples of each source before sample `index`, int64."""
        begin = index - index % STRIDE
        return self.counts[index // STRIDE] + np.bincount(self.sources[begin:index], minlength=self.counts.shape[1])


def blend_index(weights, size: int, folders: Sequence[str | os.PathLike] = ()) -> BlendIndex:
    """The blend of `size` samples from sources with these weights; a large one is cached in the first usable folder."""
    weights = normalize(weights)
    layout = (("sources", (size,), _source_dtype(weights)), ("counts", (size // STRIDE + 1, weights.size), np.int64))
    if not folders or size < CACHED_SIZE:
        return BlendIndex(*_build(weights, size))
    key = cache_key("blend 1", STRIDE, size, weights)
    return BlendIndex(*load_or_build(key, layout, lambda: _build(weights, size), folders))


def exhaustive_index(sizes) -> BlendIndex:
    """The blend that takes every sample of every source exactly once.

    Megatron's rule for it leaves out sources that are used up; those are ahead of their weight and would not be chosen
    anyway.
    """
    return blend_index(sizes, int(np.sum(sizes)))


def _source_dtype(weights: np.ndarray) -> type:
    return np.int16 if weights.size < 32767 else np.int32


def _build(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    threads = min(4, os.cpu_count() or 1)
    blocks = max(1, -(-size // STRIDE))
    rows = min(blocks, threads * min(256, max(8, MATRIX_COUNTS // min(weights.size, CANDIDATES))))
    segments = _Segments(weights, -(-blocks // rows), rows)
    parts = [part for part in np.array_split(np.arange(rows), threads) if part.size]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(segments.guess, parts))
    segments.repair()
    counts = np.concatenate([segments.counts.reshape(-1, weights.size), segments.ends[-1:].astype(np.int64)])
    return segments.sources.reshape(-1)[:size], counts[: size // STRIDE + 1]


class _Segments:
    """`rows` segments of `blocks` * STRIDE samples each, in order."""

    def __init__(self, weights: np.ndarray, blocks: int, rows: int):
        # Megatron refuses weights of 0; here such a source is never chosen
        self.weights = np.where(weights > 0, weights, -np.inf)
        self.blocks, self.length = blocks, blocks * STRIDE
        self.sources: np.ndarray = np.empty((rows, self.length), _source_dtype(weights))
        self.counts = np.full((rows, blocks, weights.size), -1, np.int64)
        self.ends = np.zeros((rows, weights.size))

    def guess(self, rows: np.ndarray) -> None:
        """Run these segments from the counts expected a little before them."""
        starts = rows * self.length
        early = np.maximum(starts - OVERLAP, 0)
        counts = np.array([_expected(self.weights, int(start)) for start in early])
        for ahead in np.unique(starts - early):  # 0 for the first segment
            some = np.flatnonzero(starts - early == ahead)
            part = counts[some]
            advance(self.weights, part, early[some], int(ahead))
            counts[some] = part
        self.fill(rows, counts)

    def repair(self) -> None:
        """Run every segment again that does not start where the one before it ended.

        At least one more is right after each pass, usually all.
        """
        while True:
            wrong = 1 + np.flatnonzero((self.counts[1:, 0] != self.ends[:-1]).any(axis=1))
            if not wrong.size:
                return
            self.fill(wrong, self.ends[wrong - 1].copy())

    def fill(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Run segments from `counts`, to their ends or until all agree with what is recorded."""
        for stride in range(self.blocks):
            if (self.counts[rows, stride] == counts).all():
                return
            self.counts[rows, stride] = counts
            begin = stride * STRIDE
            self.sources[rows, begin : begin + STRIDE] = advance(
                self.weights, counts, rows * self.length + begin, STRIDE
            )
        self.ends[rows] = counts


def _expected(weights: np.ndarray, index: int) -> np.ndarray:
    """Counts near those before sample `index`: weights * index, rounded, then corrected where that is least wrong.

    They sum to `index`.
    """
    exact = np.maximum(weights, 0) * index
    counts = np.rint(exact)
    missing = index - int(counts.sum())
    behind = np.where(weights > 0, exact - counts, -np.inf)
    if missing > 0:
        counts[np.argsort(-behind, kind="stable")[:missing]] += 1
    elif missing < 0:
        counts[np.argsort(np.where(counts > 0, behind, np.inf), kind="stable")[:-missing]] -= 1
    return counts


def advance(weights: np.ndarray, counts: np.ndarray, starts: np.ndarray, steps: int) -> np.ndarray:
    """Run independent chains: the sources of `steps` samples from starts[k] on, [chains, steps].

    counts [chains, sources] is updated.
    """
    if weights.size <= CANDIDATES + WINDOW // 4:
        return _advance(weights, counts, starts, steps)[0]
    chosen = np.empty((len(counts), steps), np.int32)
    for begin in range(0, steps, WINDOW):
        length = min(WINDOW, steps - begin)
        chosen[:, begin : begin + length] = _window(weights, counts, starts + begin, length)
    return chosen


def _window(weights: np.ndarray, counts: np.ndarray, starts: np.ndarray, steps: int) -> np.ndarray:
    """Some steps among the sources that are furthest behind at their end.

    The few chains in which another source could have been chosen are run again with all sources.
    """
    behind = weights * (starts + float(steps))[:, None] - counts
    cut = weights.size - CANDIDATES
    order = np.argpartition(behind, cut, axis=1)
    # during the window no other source is further behind than this one
    others = np.take_along_axis(behind, order[:, cut : cut + 1], axis=1)[:, 0]
    candidates = np.sort(order[:, cut:], axis=1)  # in order: of equals the first is chosen
    few = np.take_along_axis(counts, candidates, axis=1)
    chosen, least = _advance(weights[candidates], few, starts, steps, watch=True)
    chosen = np.take_along_axis(candidates, chosen, axis=1)
    doubtful = np.flatnonzero(least <= others)
    before = counts[doubtful]
    np.put_along_axis(counts, candidates, few, axis=1)
    if doubtful.size:
        chosen[doubtful] = _advance(weights, before, starts[doubtful], steps)[0]
        counts[doubtful] = before
    return chosen


def _advance(
    weights: np.ndarray, counts: np.ndarray, starts: np.ndarray, steps: int, watch: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Apply the rule `steps` times to every row: chosen columns [rows, steps], and the least w * x - count in each row.

    Unless `watch`, the second is infinity. weights: [width], or [rows, width] where the sources differ by row.
    """
    rows, width = counts.shape
    chosen = np.empty((steps, rows), np.int64)
    least = np.full(rows, np.inf)
    # Whole numbers below 2^53: adding 1 is exact. Narrow rows are multiplied faster as one block than row by row.
    sample = np.repeat(starts.astype(np.float64)[:, None], width if width < NARROW_WIDTH else 1, axis=1)
    behind, first, flat = np.empty((rows, width)), np.arange(rows) * width, counts.reshape(-1)
    values, clamped = behind.reshape(-1), np.empty_like(sample)
    for step in range(steps):
        np.multiply(weights, np.maximum(sample, 1.0, out=clamped), out=behind)  # samples 0 and 1 both count as 1
        np.subtract(behind, counts, out=behind)
        best = behind.argmax(axis=1)
        chosen[step] = best
        best += first
        if watch:
            np.minimum(least, values[best], out=least)
        flat[best] += 1.0
        sample += 1.0
    return chosen.T, least
