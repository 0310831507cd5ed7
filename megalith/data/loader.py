"""Samples to micro-batches: each rank reads its samples by global number, and that one number is the whole state."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import numpy as np
import torch

from megalith.common.errors import ConfigError, problem


class Loader:
    """Micro-batches of one data-parallel rank.

    Nothing but the number of samples consumed decides what is read, so a run resumes anywhere, with any number of
    ranks. With num_workers > 0 the next step is read in threads while this one computes; reading ahead changes nothing
    but the waiting.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        micro_batch_size: int,
        rank: int = 0,
        size: int = 1,
        order: str = "single",
        seed: int = 1234,
        num_workers: int = 2,
    ):
        """rank, size: data-parallel rank, and number of ranks.

        order: "single", that of the dataset; "cyclic", a new permutation of all samples each epoch. Megatron's cyclic
        order depends on the number of data-parallel ranks. This one is its form for one rank
        (torch.Generator().manual_seed(epoch), then randperm) with the seed added, dealt to the ranks as any order is.
        """
        if order not in ("single", "cyclic"):
            cure = "Write --dataloader-type single, or --dataloader-type cyclic"
            raise ConfigError(problem("--dataloader-type", order, "must be single or cyclic", cure))
        self.dataset, self.micro_batch_size, self.rank, self.size = dataset, micro_batch_size, rank, size
        self.order, self.seed = order, seed
        self._threads = max(1, num_workers)
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "loader") if num_workers > 0 else None
        self._ahead: tuple[int, int, list[concurrent.futures.Future]] | None = None
        self._permutation: tuple[int, np.ndarray] | None = None

    def step(self, consumed: int, global_batch_size: int) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches of the step over global samples consumed to consumed + global_batch_size - 1.

        Each is a dict of the dataset's arrays stacked to [micro_batch_size, ...], and `samples` [micro_batch_size]
        int64, their numbers; in order. Raises ConfigError when the batch does not divide, IndexError past the end of a
        dataset in single order.
        """
        futures = (
            self._start(consumed, global_batch_size)
            if self._ahead is None or self._ahead[:2] != (consumed, global_batch_size)
            else self._ahead[2]
        )
        self._ahead = None
        batches = [future.result() if isinstance(future, concurrent.futures.Future) else future for future in futures]
        if self._pool is not None and self._readable(consumed + 2 * global_batch_size):
            following = consumed + global_batch_size
            self._ahead = following, global_batch_size, self._start(following, global_batch_size)
        return batches

    def _readable(self, end: int) -> bool:
        return self.order == "cyclic" or end <= len(self.dataset)

    def _start(self, consumed: int, global_batch_size: int) -> list:
        across = self.micro_batch_size * self.size
        if global_batch_size % across or global_batch_size < across:
            low = global_batch_size // across * across
            near = " or ".join(str(number) for number in (low, low + across) if number)
            product = f"micro batch {self.micro_batch_size} x {self.size} data-parallel ranks"
            rule = f"must be a multiple of {across} ({product})"
            raise ConfigError(
                problem("--global-batch-size", global_batch_size, rule, f"Write --global-batch-size {near}")
            )
        if not self._readable(consumed + global_batch_size):
            raise IndexError(
                f"samples {consumed} to {consumed + global_batch_size} of a dataset of {len(self.dataset)}"
            )
        firsts = range(consumed + self.rank * self.micro_batch_size, consumed + global_batch_size, across)
        numbers = [np.arange(first, first + self.micro_batch_size) for first in firsts]
        indices = [self._dataset_indices(samples) for samples in numbers]
        if self._pool is None:
            return [self._read(samples, batch) for samples, batch in zip(numbers, indices)]
        return [self._pool.submit(self._read, samples, batch) for samples, batch in zip(numbers, indices)]

    def _dataset_indices(self, samples: np.ndarray) -> list[int]:
        """The indices into the dataset of global samples."""
        if self.order == "single":
            return samples.tolist()
        total = len(self.dataset)
        return [int(self._epoch(sample // total)[sample % total]) for sample in samples.tolist()]

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._permutation = epoch, torch.randperm(len(self.dataset), generator=generator).numpy()
        return self._permutation[1]

    def _read(self, samples: np.ndarray, indices: list[int]) -> dict[str, torch.Tensor]:
        rows = [self.dataset[index] for index in indices]
        batch = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
        batch["samples"] = torch.from_numpy(samples)
        return batch

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
