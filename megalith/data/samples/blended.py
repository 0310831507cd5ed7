"""Datasets of datasets: a blend whose weights may change, a corpus of several files, a source that never runs out."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megalith.data.samples.blend import blend_index


class EndlessDataset:
    """A dataset followed by further ones of the same size: samples past the end of the first come from a fresh shuffle.

    The first is Megatron's, sample for sample. What a blend takes beyond it (extreme weights, weights raised during the
    run) neither fails nor reorders what was already read.
    """

    def __init__(self, build: Callable[[int], Any]):
        """build: number of the repetition (0, 1, ...) to its dataset."""
        self._build, self._repetitions = build, {0: build(0)}

    @property
    def first(self) -> Any:
        """The dataset of repetition 0."""
        return self._repetitions[0]

    def __len__(self) -> int:
        """Samples of the first repetition."""
        return len(self.first)

    def prepare(self) -> None:
        """Build the first repetition's indices."""
        prepare(self.first)

    def locate(self, index: int) -> tuple[Any, int]:
        """(dataset of the repetition, number of the sample within it)."""
        repetition, number = divmod(index, len(self.first))
        if repetition not in self._repetitions:
            self._repetitions[repetition] = self._build(repetition)
        return self._repetitions[repetition], number

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`, whatever its size."""
        dataset, number = self.locate(index)
        return dataset[number]


class CorpusDataset:
    """The files of one corpus as one dataset: one after the other, or blended in proportion; on request shuffled."""

    def __init__(
        self, datasets: Sequence[Any], sizes: Sequence[int], *, blend: bool = False, shuffle_seed: int | None = None
    ):
        """Take sizes[k] samples of datasets[k] a repetition; past the end a new repetition takes the next ones."""
        self.datasets, self.sizes = datasets, np.asarray(sizes, np.int64)
        self._ends = np.cumsum(self.sizes).tolist()
        self._index = blend_index(self.sizes, len(self)) if blend else None
        self._order: np.ndarray | None = None
        if shuffle_seed is not None:
            self._order = np.arange(len(self))
            np.random.RandomState(shuffle_seed).shuffle(self._order)

    def __len__(self) -> int:
        """Samples of a repetition."""
        return self._ends[-1]

    def prepare(self) -> None:
        """Build the indices of every dataset."""
        for dataset in self.datasets:
            prepare(dataset)

    def locate(self, index: int) -> tuple[int, int]:
        """(dataset, number of the sample within it)."""
        repetition, position = divmod(index, len(self))
        if self._order is not None:
            position = self._order.item(position)
        if self._index is not None:
            source, number = self._index.locate(position)
        else:
            source = bisect.bisect_right(self._ends, position)
            number = position - (self._ends[source - 1] if source else 0)
        return source, repetition * self.sizes.item(source) + number

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index` of the corpus."""
        source, number = self.locate(index)
        return self.datasets[source][number]


class BlendedDataset:
    """Samples of several datasets, mixed by Megatron's rule.

    schedule: (first sample, weights) in rising order, the first at 0. At a change each source continues where it
    stopped: nothing is lost or read twice. The order up to a change does not depend on what comes after it.
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
            self._taken.append(self._taken[-1] + index.counts_before(len(index)))

    def __len__(self) -> int:
        """Samples of the blend."""
        return self.size

    @property
    def samples_per_dataset(self) -> np.ndarray:
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
        stage = bisect.bisect_right(self.starts, index) - 1
        source, number = self._indices[stage].locate(index - self.starts[stage])
        return source, int(self._taken[stage][source]) + number

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index` of the blend."""
        source, number = self.locate(index)
        return self.datasets[source][number]


def source_of(dataset: Any, index: int) -> tuple[Any, int]:
    """(dataset of one source, number of the sample within it) of a sample of any dataset that is made of others."""
    while isinstance(dataset, (BlendedDataset, CorpusDataset, EndlessDataset)):
        found, index = dataset.locate(index)
        dataset = found if isinstance(dataset, EndlessDataset) else dataset.datasets[found]
    return dataset, index


def prepare(dataset: Any) -> None:
    """Build what `dataset` builds on first use, if it has such a thing."""
    if hasattr(dataset, "prepare"):
        dataset.prepare()
