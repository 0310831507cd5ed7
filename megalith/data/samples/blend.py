"""Which source each sample of a blend comes from: Megatron's error-minimising rule, to the last bit, in parallel.

Sample i goes to the source whose share is furthest behind: the largest w_j * max(i, 1) - count_j in double precision, the first of equals.
That is a chain, each step resting on all before it. But from two different states the rule runs into one within some tens of samples:
where the two choose a and b, count_a - count'_a < count_b - count'_b, so the distance of the counts never grows. So the range is cut into
stretches that start, a little early, from the counts expected there, and run side by side as rows of a matrix; a stretch whose start is
not the end of the one before it is run again from there, until all agree. What is returned is therefore the chain, not an approximation.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np

from megalith.data.samples.index_cache import cached, key_of

STRIDE = 4096  # samples between two stored rows of counts
EARLY = 1024  # samples by which a stretch starts early
WINDOW = 64  # samples for which the sources that can be chosen are looked up once, where sources are many
CANDIDATES = 104  # how many those are
MATRIX = 40_000  # counts in a matrix: what a step touches stays in the cache
NARROW = 64  # sources
LARGE = 1 << 22  # blends of more samples than this are kept in the index cache


def normalised(weights) -> np.ndarray:
    """Weights as shares that sum to 1, float64, as Megatron normalises them."""
    weights = np.array(weights, np.float64)
    return weights / np.sum(weights)


def request(size: int, share: float, rounding: str = "core") -> int:
    """Samples that Megatron asks of a source with this share of a blend of `size`, its margin of 0.5 % included."""
    return math.ceil(math.ceil(size * share) * (1 + 0.005)) if rounding == "core" else math.ceil(size * share * 1.005)


@dataclasses.dataclass(frozen=True)
class BlendIndex:
    """sources [size]: the source of each sample. counts [size // STRIDE + 1, sources]: samples taken before every STRIDE-th one."""

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

    def taken(self, index: int) -> np.ndarray:
        """Samples that each source has given before sample `index`, int64."""
        begin = index - index % STRIDE
        return self.counts[index // STRIDE] + np.bincount(self.sources[begin:index], minlength=self.counts.shape[1])


def blend_index(weights, size: int, folders: Sequence[str | os.PathLike] = ()) -> BlendIndex:
    """The blend of `size` samples from sources with these weights; a large one is kept in the first of `folders` that can be used."""
    shares = normalised(weights)
    layout = (("sources", (size,), _kind(shares)), ("counts", (size // STRIDE + 1, shares.size), np.int64))
    if not folders or size < LARGE:
        return BlendIndex(*_build(shares, size))
    return BlendIndex(*cached(key_of("blend 1", STRIDE, size, shares), layout, lambda: _build(shares, size), folders))


def exhaustive_index(sizes) -> BlendIndex:
    """The blend that takes every sample of every source exactly once.

    Megatron's rule for it leaves out sources that are used up; those are ahead of their share and would not be chosen anyway.
    """
    return blend_index(sizes, int(np.sum(sizes)))


def _kind(shares: np.ndarray) -> type:
    return np.int16 if shares.size < 32767 else np.int32


def _build(shares: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    threads = min(4, os.cpu_count() or 1)
    strides = max(1, -(-size // STRIDE))
    rows = min(strides, threads * min(256, max(8, MATRIX // min(shares.size, CANDIDATES))))
    run = _Stretches(shares, -(-strides // rows), rows)
    parts = [part for part in np.array_split(np.arange(rows), threads) if part.size]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(run.guess, parts))
    run.repair()
    counts = np.concatenate([run.counts.reshape(-1, shares.size), run.ends[-1:].astype(np.int64)])
    return run.sources.reshape(-1)[:size], counts[: size // STRIDE + 1]


class _Stretches:
    """`rows` stretches of `strides` * STRIDE samples each, in order."""

    def __init__(self, shares: np.ndarray, strides: int, rows: int):
        self.shares = np.where(
            shares > 0, shares, -np.inf
        )  # Megatron refuses weights of 0; here such a source is never chosen
        self.strides, self.length = strides, strides * STRIDE
        self.sources: np.ndarray = np.empty((rows, self.length), _kind(shares))
        self.counts = np.full((rows, strides, shares.size), -1, np.int64)
        self.ends = np.zeros((rows, shares.size))

    def guess(self, rows: np.ndarray) -> None:
        """Run these stretches from the counts expected a little before them."""
        starts = rows * self.length
        early = np.maximum(starts - EARLY, 0)
        counts = np.array([_expected(self.shares, int(start)) for start in early])
        for ahead in np.unique(starts - early):  # 0 for the first stretch
            some = np.flatnonzero(starts - early == ahead)
            part = counts[some]
            advance(self.shares, part, early[some], int(ahead))
            counts[some] = part
        self.fill(rows, counts)

    def repair(self) -> None:
        """Run every stretch again that does not start where the one before it ended. One more is right each time, as a rule all."""
        while True:
            wrong = 1 + np.flatnonzero((self.counts[1:, 0] != self.ends[:-1]).any(axis=1))
            if not wrong.size:
                return
            self.fill(wrong, self.ends[wrong - 1].copy())

    def fill(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Run stretches from `counts`, until their ends or until all have met what is recorded."""
        for stride in range(self.strides):
            if (self.counts[rows, stride] == counts).all():
                return
            self.counts[rows, stride] = counts
            begin = stride * STRIDE
            self.sources[rows, begin : begin + STRIDE] = advance(
                self.shares, counts, rows * self.length + begin, STRIDE
            )
        self.ends[rows] = counts


def _expected(shares: np.ndarray, index: int) -> np.ndarray:
    """Counts near those before sample `index`: the shares rounded, then corrected to sum to `index` where that is least wrong."""
    exact = np.maximum(shares, 0) * index
    counts = np.rint(exact)
    missing = index - int(counts.sum())
    behind = np.where(shares > 0, exact - counts, -np.inf)
    if missing > 0:
        counts[np.argsort(-behind, kind="stable")[:missing]] += 1
    elif missing < 0:
        counts[np.argsort(np.where(counts > 0, behind, np.inf), kind="stable")[:-missing]] -= 1
    return counts


def advance(shares: np.ndarray, counts: np.ndarray, starts: np.ndarray, steps: int) -> np.ndarray:
    """Run independent chains: the sources of `steps` samples from starts[k] on, [chains, steps]; `counts` [chains, sources] is updated."""
    if shares.size <= CANDIDATES + WINDOW // 4:
        return _advance(shares, counts, starts, steps)[0]
    chosen = np.empty((len(counts), steps), np.int32)
    for begin in range(0, steps, WINDOW):
        length = min(WINDOW, steps - begin)
        chosen[:, begin : begin + length] = _window(shares, counts, starts + begin, length)
    return chosen


def _window(shares: np.ndarray, counts: np.ndarray, starts: np.ndarray, steps: int) -> np.ndarray:
    """A short run among the sources that are furthest behind at its end; the few chains where others could have come in are run in full."""
    behind = shares * (starts + float(steps))[:, None] - counts
    cut = shares.size - CANDIDATES
    order = np.argpartition(behind, cut, axis=1)
    others = np.take_along_axis(behind, order[:, cut : cut + 1], axis=1)[
        :, 0
    ]  # during the window no other source is further behind
    candidates = np.sort(order[:, cut:], axis=1)  # in order: of equals the first is chosen
    few = np.take_along_axis(counts, candidates, axis=1)
    chosen, least = _advance(shares[candidates], few, starts, steps, watch=True)
    chosen = np.take_along_axis(candidates, chosen, axis=1)
    doubtful = np.flatnonzero(least <= others)
    before = counts[doubtful]
    np.put_along_axis(counts, candidates, few, axis=1)
    if doubtful.size:
        chosen[doubtful] = _advance(shares, before, starts[doubtful], steps)[0]
        counts[doubtful] = before
    return chosen


def _advance(
    shares: np.ndarray, counts: np.ndarray, starts: np.ndarray, steps: int, watch: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The rule, `steps` times on every row: chosen columns [rows, steps]; if watched, the least w * x - count chosen in each row.

    shares: [width], or [rows, width] where rows have sources of their own.
    """
    rows, width = counts.shape
    chosen = np.empty((steps, rows), np.int64)
    least = np.full(rows, np.inf)
    # Whole numbers below 2^53: adding 1 is exact. Narrow rows are multiplied faster as one block than row by row.
    place = np.repeat(starts.astype(np.float64)[:, None], width if width < NARROW else 1, axis=1)
    behind, first, flat = np.empty((rows, width)), np.arange(rows) * width, counts.reshape(-1)
    values, clamped = behind.reshape(-1), np.empty_like(place)
    for step in range(steps):
        np.multiply(shares, np.maximum(place, 1.0, out=clamped), out=behind)  # samples 0 and 1 both count as 1
        np.subtract(behind, counts, out=behind)
        best = behind.argmax(axis=1)
        chosen[step] = best
        best += first
        if watch:
            np.minimum(least, values[best], out=least)
        flat[best] += 1.0
        place += 1.0
    return chosen.T, least
