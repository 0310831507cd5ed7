"""The loader that `Accelerator.prepare` makes of a torch DataLoader.

One process reads for all that hold a model together, and sends them what it has read: whatever a dataset or a collate
function draws at random (masks of BERT, say), tensor- and pipeline-parallel processes see the same batch. An epoch's
order is that of rank 0, and so that of one process with as large a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.data_loader import skip_first_batches as accelerate_skip_first_batches
from accelerate.utils import send_to_device

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import DataError
from megalith.integrations.accelerate.data.random_state import RandomState, get_random_state, set_random_state
from megalith.integrations.accelerate.data.sharding import ShardedBatches, repeated

END = object()  # what `next` gives after the last batch


@dataclasses.dataclass
class Readers:
    """Who reads, and for whom.

    rank, size: data-parallel rank of this process, and number of ranks. together: the processes that get what the first
    of them reads; None where each reads for itself. everyone: all processes, the first of which decides on the order;
    None for one process alone. dispatched: one process reads for all, each rank's share.
    """

    rank: int = 0
    size: int = 1
    together: Ranks | None = None
    everyone: Ranks | None = None
    dispatched: bool = False


@dataclasses.dataclass
class Position:
    """Where a loader is; shared with the loaders that `skip_first_batches` makes of it.

    epoch: counted from 0. batches: given of it already. start: the random state at its beginning. resumed: that of the
    epoch which the next iteration takes up again, without its first `skip` batches.
    """

    epoch: int = 0
    batches: int = 0
    start: RandomState | None = None
    resumed: RandomState | None = None
    skip: int = 0


class Message(NamedTuple):
    """What was read: the batch, or the shares of all ranks; the samples of all ranks; whether it is the last.

    random: the state after it, so that the processes that did not read draw the same from there on.
    """

    batch: Any
    samples: int
    last: bool
    random: RandomState | None


class Failure(NamedTuple):
    """Why nothing was read."""

    text: str


class MegatronDataLoader(DataLoaderShard):
    """Batches of this data-parallel process's samples; every process iterates over it.

    micro_batch_size: batch size of the script's own loader, in samples; a batch here has it for each micro-batch.
    end_of_dataloader, remainder: of the present batch, as Accelerate's loaders have them. repeated: how many samples at
    the end of the present batch repeat others, because the last batch of an epoch did not come out even.
    """

    def __init__(
        self, dataset: Any, *, readers: Readers, shards: ShardedBatches | None, micro_batch_size: int | None,
        global_batch_size: int | None, even: bool, generators: Sequence[torch.Generator] = (),
        rng_types: Collection[str] = (), resumes_position: bool = False, **options: Any,
    ):  # fmt: skip
        """shards: the sampler of a dataset with numbered samples. even: whether all ranks have as many samples.

        generators: which decide on the order beside the global ones. rng_types: Accelerate's; all processes draw as
        rank 0 from the beginning of an epoch on, where "generator" goes without saying.
        resumes_position: load_state_dict resumes within the epoch, without skip_first_batches.
        options: of accelerate.data_loader.DataLoaderShard.
        """
        self.position = Position()
        super().__init__(dataset, **options)
        self.readers, self.shards, self.even, self.generators = readers, shards, even, generators
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        names = [str(getattr(each, "value", each)) for each in rng_types]
        self.rng_types = [name for name in names if name != "generator"]
        self.resumes_position, self.repeated = resumes_position, 0
        self.use_stateful_dataloader = True  # so that Accelerate's save_state asks for `state_dict`

    @property
    def iteration(self) -> int:
        """Epochs that are done; `set_epoch` of samplers and datasets gets it."""
        return self.position.epoch

    @iteration.setter
    def iteration(self, epoch: int) -> None:
        self.position.epoch = epoch

    @property
    def total_batch_size(self) -> int | None:
        """Samples of a batch on all data-parallel processes; None where the script's sampler decides."""
        return self.global_batch_size

    def set_epoch(self, epoch: int) -> None:
        """As Accelerate's; the next iteration has the order of that epoch where the sampler knows of epochs."""
        super().set_epoch(epoch)
        if self.shards is not None:
            self.shards.set_epoch(epoch)

    def begin(self) -> None:
        """Make this the loader that gradient accumulation and gather_for_metrics look at."""
        self.reset()
        self.repeated = 0
        self.gradient_state._add_dataloader(self)

    def __len__(self) -> int:
        return max(0, super().__len__() - self.skip_batches)

    def __iter__(self) -> Iterator[Any]:
        self.begin()
        try:
            self.set_epoch(self.iteration)
            first, self.position.skip = self.skip_batches + self.position.skip, 0
            if self.shards is not None:
                self.shards.skip = first
            for number, message in enumerate(self._messages(), 0 if self.shards is None else first):
                self._note(message, number)
                if number >= first:
                    batch = message.batch[self.readers.rank] if self.readers.dispatched else message.batch
                    yield batch if self.device is None else self._on_device(batch)
        finally:
            self.end()

    def _on_device(self, batch: Any) -> Any:
        return send_to_device(batch, self.device, non_blocking=self._non_blocking)

    def _note(self, message: Message, number: int) -> None:
        """Say of the batch that is given next what a script and Accelerate may ask. number: in the epoch, from 0."""
        position, size = self.position, self.readers.size
        position.batches = number + 1
        if message.last:
            self.end_of_dataloader = True
            self.remainder = 0 if message.samples == self.global_batch_size else message.samples
            position.epoch, position.batches, position.start = position.epoch + 1, 0, None
        self.repeated = repeated(message.samples, self.readers.rank, size) if self.even else 0

    def _messages(self) -> Iterator[Message]:
        """What this process reads, or what is read for it."""
        together = self.readers.together
        start = self._start()
        messages = self._read(*start) if together is None or together.rank == 0 else None
        while True:
            try:
                message: Any = next(messages, None) if messages else None
            except Exception as error:
                if together is not None:
                    together.from_rank_0(Failure(f"{type(error).__name__}: {error}"))
                raise
            if together is not None:
                message = together.from_rank_0(message)
                if isinstance(message, Failure):
                    raise DataError(f"The process that reads for this one could not read a batch: {message.text}")
                if message is not None and together.rank:
                    set_random_state(message.random, self.generators)
            if message is None:
                return
            yield message
            if message.last:
                return

    def _start(self) -> tuple[RandomState, bool]:
        """Rank 0's random state for the beginning of the epoch, and whether an earlier state goes on after it."""
        position, everyone = self.position, self.readers.everyone
        resumed, position.resumed = position.resumed, None
        start = resumed or get_random_state(self.generators)
        if everyone is not None:
            start = everyone.from_rank_0(start)
            for kind in self.rng_types:
                if kind != "torch":
                    device = torch.get_device_module(kind)
                    device.set_rng_state(everyone.from_rank_0(device.get_rng_state()))
        position.start = start
        other = everyone is not None and everyone.rank != 0 and "torch" not in self.rng_types
        return start, other or resumed is not None

    def _read(self, start: RandomState, restore: bool) -> Iterator[Message]:
        """Read the epoch. The sampler draws its order when the first batch is read.

        restore: whether this process's own random state goes on afterwards.
        """
        own = get_random_state()
        set_random_state(start, self.generators)
        iterator = iter(self.base_dataloader)
        read = next(iterator, END)
        if restore:
            set_random_state(own)
        batch: Any
        while read is not END:
            following = next(iterator, END)
            if self.shards is None or self.readers.dispatched:  # SharedCollate gave it
                samples, batch = read  # type: ignore[misc]
                batch = batch if self.readers.dispatched else batch[0]
            else:
                samples, batch = self.shards.counts.popleft(), read
            sent = self.readers.together is not None
            state = get_random_state(self.generators) if sent else None
            yield Message(batch, samples, following is END, state)
            read = following

    def state_dict(self) -> dict[str, Any]:
        """Where it is, equal on every process; `load_state_dict` takes it in any layout.

        epoch; batches given of it; random: the state at its beginning, or between epochs that of `generators` alone.
        """
        start = self.position.start or {"generators": [each.get_state() for each in self.generators]}
        return {"epoch": self.position.epoch, "batches": self.position.batches, "random": start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume: the next iteration has the order of the epoch that was interrupted, from its beginning.

        skip_first_batches skips what was done of it, or with DataLoaderConfiguration(use_stateful_dataloader=True) the
        loader itself. Afterwards random numbers are drawn from the state that is there now.
        """
        for generator, own in zip(self.generators, state["random"]["generators"]):
            generator.set_state(own)
        position, interrupted = self.position, state["batches"] > 0
        position.epoch, position.batches, position.start = state["epoch"], 0, None
        position.resumed = state["random"] if interrupted else None
        position.skip = state["batches"] if self.resumes_position else 0

    def skip(self, num_batches: int) -> MegatronDataLoader:
        """The same loader without its next num_batches batches, for one epoch."""
        skipped = object.__new__(MegatronDataLoader)
        skipped.__dict__.update(vars(self))
        skipped.skip_batches = self.skip_batches + num_batches
        return skipped


def skip_first_batches(loader: Any, num_batches: int = 0) -> Any:
    """A loader without the first num_batches batches of the next epoch: accelerate.skip_first_batches."""
    if isinstance(loader, MegatronDataLoader):
        return loader.skip(num_batches)
    return accelerate_skip_first_batches(loader, num_batches)
