"""Which source each sample of a blend comes from: Megatron's error-minimising rule, to the last bit.

Sample i goes to the source whose share is furthest behind: the largest w_j * max(i, 1) - count_j in double precision, the first of equals.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

STRIDE = 4096  # samples between two stored rows of counts


def normalised(weights) -> np.ndarray:
    """Weights as shares that sum to 1, float64, as Megatron normalises them."""
    weights = np.array(weights, np.float64)
    return weights / np.sum(weights)


def request(size: int, share: float, rounding: str = "core") -> int:
    """Samples that Megatron asks of a source with this share of a blend of `size`, its margin of 0.5 % included."""
    return math.ceil(math.ceil(size * share) * (1 + 0.005)) if rounding == "core" else math.ceil(size * share * 1.005)


def choose(weights: np.ndarray, counts: np.ndarray, start: int, steps: int) -> np.ndarray:
    """The sources of samples start to start + steps - 1, int32; `counts` (float64, samples taken so far) is brought up to date."""
    chosen = np.empty(steps, np.int32)
    behind = np.empty_like(weights)
    for step in range(steps):
        np.multiply(weights, max(float(start + step), 1.0), out=behind)
        behind -= counts
        source = behind.argmax()
        chosen[step] = source
        counts[source] += 1.0
    return chosen


@dataclasses.dataclass(frozen=True)
class BlendIndex:
    """sources [size]: the source of each sample. counts [size / STRIDE + 1, sources]: samples taken before every STRIDE-th one."""

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


def blend_index(weights, size: int) -> BlendIndex:
    """The blend of `size` samples from sources with these weights (normalised here)."""
    shares = normalised(weights)
    shares[shares == 0] = -np.inf  # Megatron refuses weights of 0; here such a source is never chosen
    sources = np.empty(size, np.int16 if shares.size < 32767 else np.int32)
    counts = np.zeros((size // STRIDE + 1, shares.size), np.int64)
    taken = np.zeros(shares.size)
    for begin in range(0, size, STRIDE):
        counts[begin // STRIDE] = taken
        sources[begin : begin + STRIDE] = choose(shares, taken, begin, min(STRIDE, size - begin))
    counts[-1] = taken if size % STRIDE == 0 else counts[-1]
    return BlendIndex(sources, counts)


def exhaustive_index(sizes) -> BlendIndex:
    """The blend that takes every sample of every source exactly once: the same rule among the sources that still have some."""
    left = np.array(sizes, np.int64)
    total = int(left.sum())
    shares, taken = left / float(total), np.zeros(left.size)
    sources = np.empty(total, np.int16 if left.size < 32767 else np.int32)
    counts = np.zeros((total // STRIDE + 1, left.size), np.int64)
    shares[left == 0] = -np.inf
    for index in range(total):
        if index % STRIDE == 0:
            counts[index // STRIDE] = taken
        source = int(np.argmax(shares * max(float(index), 1.0) - taken))
        sources[index] = source
        taken[source] += 1.0
        if taken[source] == left[source]:
            shares[source] = -np.inf
    if total % STRIDE == 0:
        counts[-1] = taken
    return BlendIndex(sources, counts)
