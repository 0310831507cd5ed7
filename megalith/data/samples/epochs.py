"""Datasets of a known number of samples, read whole: every sample once per epoch, or once per validation.

A global batch need not divide that number. What a last batch lacks is filled with samples that count for nothing: their
`loss_mask` is zero.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class Epochs:
    """A training dataset for some epochs, each in its own order, a function of (seed, epoch) alone.

    Epochs follow one another without a gap, so that a batch may hold the end of one and the beginning of the next.
    """

    def __init__(self, dataset: Any, total: int, *, seed: int = 1234, padding: int = 0):
        """total: samples of the whole run. padding: how many more may be read, which count for nothing."""
        self.dataset, self.total, self.seed, self.padding = dataset, total, seed, padding
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def samples_per_epoch(self) -> int:
        """Samples of the dataset."""
        return len(self.dataset)

    def __len__(self) -> int:
        """Samples that can be read, those that count for nothing included."""
        return self.total + self.padding

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index` of the run."""
        if index >= self.total:
            return uncounted(self.dataset[0])
        epoch, place = divmod(index, len(self.dataset))
        return self.dataset[int(self.order(epoch)[place])]

    def order(self, epoch: int) -> np.ndarray:
        """int64 [samples of an epoch]: a permutation."""
        order = self._order  # read once, as threads read samples of two epochs
        if order is None or order[0] != epoch:
            self._order = order = epoch, np.random.RandomState([self.seed, epoch]).permutation(len(self.dataset))
        return order[1]


class OneEpoch:
    """A validation dataset whose length is rounded up to whole global batches."""

    def __init__(self, dataset: Any, batch: int):
        self.dataset, self.batches = dataset, math.ceil(len(dataset) / batch)
        self.length = self.batches * batch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`; one that counts for nothing behind the last."""
        return self.dataset[index] if index < len(self.dataset) else uncounted(self.dataset[0])


def uncounted(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A sample with a loss mask of zeros: no loss and no metric counts it."""
    return sample | {"loss_mask": np.zeros_like(sample["loss_mask"])}
