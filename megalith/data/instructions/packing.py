"""Samples into rows of a fixed length: the fewest rows that best-fit finds, anew and in another order each epoch.

The lengths alone decide which lengths share a row, so every epoch has as many rows. Which samples of a length are where
is drawn by (seed, epoch): a packing of lengths and a dealing of samples, as in Krell et al., 2021 (arXiv 2107.02027,
section 3), with best-fit decreasing in place of their histogram heuristics (both leave under 1 % empty on usual data).
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Packing:
    """Which samples of an epoch are in which row: row r has `samples[ends[r - 1] : ends[r]]`."""

    samples: np.ndarray  # int64
    ends: np.ndarray  # int64, one for each row

    def row(self, number: int) -> np.ndarray:
        """The numbers of the samples in a row."""
        return self.samples[self.ends[number - 1] if number else 0 : self.ends[number]]


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each length, int64, given the lengths in falling order (Johnson, 1974: best-fit decreasing).

    Each goes into the fullest row that has room for it. Takes about a microsecond for each. Lengths are at most
    `capacity`.
    """
    rows = np.empty(len(lengths), np.int64)
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left
    spaces = 0  # bit s is set where with_space[s] has a row: the least s of at least a length is one bit operation
    number = 0
    for position, length in enumerate(lengths.tolist()):
        above = spaces >> length
        if above:
            space = length + (above & -above).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, row, number = capacity, number, number + 1
        if space > length:
            with_space[space - length].append(row)
            spaces |= 1 << (space - length)
        rows[position] = row
    return rows


class Packer:
    """Packs samples of these lengths, epoch by epoch."""

    def __init__(self, lengths: np.ndarray, capacity: int, seed: int, *, pack: bool = True):
        """lengths: int64, 1 to `capacity`. pack: False puts each sample into a row of its own."""
        self.lengths, self.seed, self.pack = lengths, seed, pack
        falling = np.sort(lengths)[::-1]
        self._rows = best_fit(falling, capacity) if pack else np.arange(len(lengths))
        self.num_rows = int(self._rows.max(initial=-1)) + 1

    def epoch(self, epoch: int) -> Packing:
        """The packing of an epoch, a function of (seed, epoch): every sample once."""
        random = np.random.RandomState([self.seed % 2**32, epoch])
        drawn = random.permutation(len(self.lengths))
        if self.pack:  # sorted by length, samples of one length in the order drawn
            drawn = drawn[np.argsort(-self.lengths[drawn], kind="stable")]
        place = random.permutation(self.num_rows)[self._rows]  # rows in another order
        order = np.argsort(place, kind="stable")
        return Packing(drawn[order], np.cumsum(np.bincount(place, minlength=self.num_rows)))
