"""Which of many values was there before, and where, out of core."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable

import numpy as np

from megalith.curation.parts import PartOutput
from megalith.curation.words import mix

AT_ONCE = 1 << 24  # values in memory


def first_occurrences(values: Callable[[], Iterable[np.ndarray]], count: int, path: pathlib.Path) -> np.ndarray:
    """int64 [count], in a file at `path`: the place where each value is for the first time, its own where it is new.

    values: called for the uint64 values in pieces, in order; 0 is no value, and always new. They are sorted range by
    range, AT_ONCE of them or so, so that memory does not grow with their number; the file has 8 bytes of each.
    """
    first = np.memmap(path, np.int64, "w+", shape=(max(1, count),))
    ranges = max(1, -(-count // AT_ONCE))
    for number in range(ranges):
        found, places, start = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
        for piece in values():
            # Values may be anything, hashes too, so they are mixed before they are cut into ranges.
            inside = np.flatnonzero((piece != 0) & (mix(piece) % np.uint64(ranges) == number))
            if number == 0:
                first[start : start + len(piece)] = np.arange(start, start + len(piece))
            found.append(piece[inside])
            places.append(inside + start)
            start += len(piece)
        order = np.argsort(all_values := np.concatenate(found), kind="stable")
        in_order, place = all_values[order], np.concatenate(places)[order]
        new = np.concatenate([[True], in_order[1:] != in_order[:-1]])[: len(in_order)]
        first[place] = place[new][np.cumsum(new) - 1]
    first.flush()
    return first[:count]


class FirstPlaces:
    """Reads what `first_occurrences` wrote beside the documents of a part, in their order."""

    def __init__(self, path: str, starts: dict[int, int]):
        """path: of its file. starts: the number of the first value of each part."""
        self.places, self.starts = np.memmap(path, np.int64, "r"), starts
        self.part, self.at = -1, 0

    def begin(self, out: PartOutput) -> None:
        """Of a batch: the first of a part begins with the values of that."""
        if out.number != self.part or out.position == 0:
            self.part, self.at = out.number, self.starts[out.number]

    def take(self, count: int) -> np.ndarray:
        """bool [count]: whether the next values are there for the first time."""
        start, self.at = self.at, self.at + count
        return self.places[start : self.at] == np.arange(start, self.at)
