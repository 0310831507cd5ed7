"""Datasets of a known number of samples, read whole: every sample once per epoch, or once per validation.

A global batch need not divide that number. What a last batch lacks is filled with samples that count for nothing: their
`loss_mask` is zero.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np


class Epochs:
    """A training dataset for some epochs, each in its own order, a function of (seed, epoch) alone.

    Epochs follow one another without a gap, so that a batch may hold the end of one and the beginning of the next.
    A dataset with a method `in_epoch` (epoch, index) draws the order of each itself: it may pack samples anew.
    """

    def __init__(self, dataset: Any, total: int, *, seed: int = 1234, padding: int = 0):
        """total: samples of the whole run. padding: how many more may be read, which count for nothing."""
        self.dataset, self.total, self.seed, self.padding = dataset, total, seed, padding

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
        if hasattr(self.dataset, "in_epoch"):  # it draws its epochs itself
            return self.dataset.in_epoch(epoch, place)
        return self.dataset[int(self.order(epoch)[place])]

    def order(self, epoch: int) -> np.ndarray:
        """int64 [samples of an epoch]: a permutation."""
        return epoch_order(self.seed, epoch, len(self.dataset))


@functools.lru_cache(maxsize=2)  # threads read samples of two epochs
def epoch_order(seed: int, epoch: int, samples: int) -> np.ndarray:
    """int64 [samples]: the order of an epoch, a permutation drawn from (seed, epoch)."""
    return np.random.RandomState([seed, epoch]).permutation(samples)


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
