"""Datasets made of datasets: a blend whose weights may change during the run, a corpus of several files, a source that never runs out."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megalith.data.samples.blend import blend_index


class Endless:
    """A dataset followed by further ones of the same size: samples past the end of the first come from a fresh shuffle.

    The first is Megatron's, sample for sample. What a blend takes beyond it (extreme weights, weights raised during the run) neither fails
    nor reorders what was already read.
    """

    def __init__(self, make: Callable[[int], Any]):
        """make: number of the round (0, 1, ...) to the dataset of that round."""
        self._make, self._rounds = make, {0: make(0)}

    @property
    def first(self) -> Any:
        """The dataset of round 0."""
        return self._rounds[0]

    def __len__(self) -> int:
        """Samples of the first round."""
        return len(self.first)

    def prepare(self) -> None:
        """Build the first round's indices."""
        prepare(self.first)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`, whatever its size."""
        turn, place = divmod(index, len(self.first))
        if turn not in self._rounds:
            self._rounds[turn] = self._make(turn)
        return self._rounds[turn][place]


class Corpus:
    """The files of one corpus read as one dataset: one after the other, or blended in proportion; on request shuffled."""

    def __init__(
        self, parts: Sequence[Any], sizes: Sequence[int], *, blend: bool = False, shuffle_seed: int | None = None
    ):
        """Take sizes[k] samples of parts[k] a round; past the end a new round takes the next ones."""
        self.parts, self.sizes = parts, np.asarray(sizes, np.int64)
        self._ends = np.cumsum(self.sizes).tolist()
        self._index = blend_index(self.sizes, len(self)) if blend else None
        self._order: np.ndarray | None = None
        if shuffle_seed is not None:
            self._order = np.arange(len(self))
            np.random.RandomState(shuffle_seed).shuffle(self._order)

    def __len__(self) -> int:
        """Samples of a round."""
        return self._ends[-1]

    def prepare(self) -> None:
        """Build the indices of the parts."""
        for part in self.parts:
            prepare(part)

    def locate(self, index: int) -> tuple[int, int]:
        """(part, number of the sample within it)."""
        turn, place = divmod(index, len(self))
        if self._order is not None:
            place = self._order.item(place)
        if self._index is not None:
            part, number = self._index.locate(place)
        else:
            part = bisect.bisect_right(self._ends, place)
            number = place - (self._ends[part - 1] if part else 0)
        return part, turn * self.sizes.item(part) + number

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index` of the corpus."""
        part, number = self.locate(index)
        return self.parts[part][number]


class Blended:
    """Samples of several datasets, mixed by Megatron's rule.

    schedule: (first sample, weights) in rising order, the first at 0. At a change each source goes on where it stopped: nothing is lost
    or read twice. The order up to a change does not depend on what comes after it.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        schedule: Sequence[tuple[int, Sequence[float]]],
        size: int,
        folders: Sequence[str | os.PathLike] = (),
    ):
        """Blend `datasets` into `size` samples; a large index is kept in one of `folders`."""
        self.datasets, self.size = datasets, size
        self.starts = [start for start, _ in schedule if start < size or start == 0]
        self._indices, self._taken = [], [np.zeros(len(datasets), np.int64)]
        for (start, weights), end in zip(schedule, [*self.starts[1:], size]):
            index = blend_index(weights, end - start, folders)
            self._indices.append(index)
            self._taken.append(self._taken[-1] + index.taken(len(index)))

    def __len__(self) -> int:
        """Samples of the blend."""
        return self.size

    @property
    def taken(self) -> np.ndarray:
        """Samples that the whole blend takes of each dataset, int64."""
        return self._taken[-1]

    def prepare(self) -> None:
        """Build the indices of every dataset."""
        for dataset in self.datasets:
            prepare(dataset)

    def locate(self, index: int) -> tuple[int, int]:
        """(dataset, number of the sample within it)."""
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of a blend of {self.size}")
        part = bisect.bisect_right(self.starts, index) - 1
        source, number = self._indices[part].locate(index - self.starts[part])
        return source, int(self._taken[part][source]) + number

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index` of the blend."""
        source, number = self.locate(index)
        return self.datasets[source][number]


def prepare(dataset: Any) -> None:
    """Build what `dataset` builds on first use, if it has such a thing."""
    if hasattr(dataset, "prepare"):
        dataset.prepare()
