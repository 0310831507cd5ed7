"""How data-parallel processes divide the samples of a global batch: in order, as evenly as possible.

Accelerate's own sampler (BatchSamplerShard) completes the last batch of an epoch to its full size with samples of the
first, all of which count in the loss, and without `even_batches` gives some processes a batch more than others, which
would then wait for ever in a call of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import BatchSampler

from megalith.common.errors import DataError, problem


def share(samples: Sequence, rank: int, size: int, even: bool) -> list:
    """The samples of data-parallel process `rank` of `size`, of a batch of all of them.

    even: as many for each, and where they do not come out even the last processes repeat samples from the beginning.
    Raises DataError where they need not come out even, and there are fewer than processes.
    """
    if even:
        each = -(-len(samples) // size)
        return [samples[number % len(samples)] for number in range(rank * each, (rank + 1) * each)]
    each, more = divmod(len(samples), size)
    if not each:
        rule = f"must have one for each of the {size} data-parallel processes"
        cure = "Write DataLoader(..., drop_last=True), or even_batches=True, which repeats some"
        raise DataError(problem("The samples of the last batch of an epoch", len(samples), rule, cure))
    first = rank * each + min(rank, more)
    return list(samples[first : first + each + (rank < more)])


def repeated(samples: int, rank: int, size: int) -> int:
    """How many of the samples that an even `share` of so many gives are repeated ones; they are the last."""
    each = -(-samples // size)
    return min(each, max(0, (rank + 1) * each - samples))


class ShardedBatches(BatchSampler):
    """This process's share of each global batch: of `together` batches in a row of a script's own sampler.

    batch_size, num_processes, drop_last: as Accelerate reads them; batch_size is that of a share. samples: in the
    global batch that was drawn last. skip: how many global batches the next iteration leaves out.
    """

    def __init__(
        self, batch_sampler: Iterable, *, batch_size: int | None, together: int, rank: int, size: int, even: bool
    ):  # fmt: skip
        """batch_size: of the script's sampler; None where it varies."""
        self.batch_sampler, self.together = batch_sampler, together
        self.rank, self.num_processes, self.even = rank, size, even
        self.batch_size = batch_size and batch_size * together // size
        self.drop_last = getattr(batch_sampler, "drop_last", False)
        self.samples = self.skip = 0

    @property
    def sampler(self) -> Any:
        """The sampler of single samples below; None where there is none."""
        return getattr(self.batch_sampler, "sampler", None)

    def set_epoch(self, epoch: int) -> None:
        """Tell the samplers below, as far as they ask."""
        for each in (self.batch_sampler, self.sampler):
            if hasattr(each, "set_epoch"):
                each.set_epoch(epoch)

    def __iter__(self) -> Iterator[list]:
        batches = iter(self.batch_sampler)
        for number in itertools.count():
            group = list(itertools.islice(batches, self.together))
            if not group or (self.drop_last and len(group) < self.together):
                return
            if number >= self.skip:
                samples = [sample for batch in group for sample in batch]
                self.samples = len(samples)
                yield share(samples, self.rank, self.num_processes, self.even)

    def __len__(self) -> int:
        count = len(self.batch_sampler)  # type: ignore[arg-type]
        return count // self.together if self.drop_last else -(-count // self.together)


class SharedCollate:
    """A collate function over the samples of a global batch: (how many, [the collated share of each of `ranks`])."""

    def __init__(self, collate: Callable[[list], Any], ranks: Sequence[int], size: int, even: bool):
        self.collate, self.ranks, self.size, self.even = collate, ranks, size, even

    def __call__(self, samples: list) -> tuple[int, list]:
        return len(samples), [self.collate(share(samples, rank, self.size, self.even)) for rank in self.ranks]
