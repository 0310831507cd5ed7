"""Samples of chats and completions for supervised finetuning: packed rows of GPT, pairs of an encoder and a decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.config.flags.text import Words
from megalith.data.instructions.packing import Packer
from megalith.data.instructions.preview import preview
from megalith.data.instructions.store import Stores
from megalith.data.samples.blend import blend_index

FEW = 5  # lines of files named in a message


class InstructionDataset:
    """Random access to rows of whole samples. An epoch has every sample once, in rows and an order of (seed, epoch).

    Attributes: files, what it is read from.
    """

    def __init__(
        self, stores: Stores, *, seed: int = 1234, pad: int = 0, pack: bool = True,
        excess_length_strategy: str = "drop", decode: Callable[[Iterable[int]], str] | None = None,
    ):  # fmt: skip
        """stores: the files, as one. pad: the token behind the samples of a row.

        excess_length_strategy: what becomes of samples that are longer than a row, "drop", "truncate" or "raise".
        decode: tokens to text, for `describe`. Raises DataError where no sample is left, or by "raise".
        """
        self.stores, self.pad, self.decode, self.files = stores, pad, decode, stores.files
        self._notes = list[str]()
        self.kept = np.flatnonzero(self._usable(excess_length_strategy))
        if not len(self.kept):
            found = Words(f"{len(stores)} samples: {'; '.join(self._notes)}")
            cure = "Raise --seq-length, or use other data"
            raise DataError(problem(", ".join(self.files), found, "must have a sample to learn from", cure))
        self.packer = Packer(np.minimum(self.needed(), self.capacity)[self.kept], self.capacity, seed, pack=pack)
        self._packing = functools.lru_cache(maxsize=2)(self.packer.epoch)

    @property
    def capacity(self) -> int:
        """Room of a row, in the measure of `needed`."""
        raise NotImplementedError

    @property
    def room(self) -> str:
        """The room of a row, for messages."""
        raise NotImplementedError

    def needed(self) -> np.ndarray:
        """How much of a row each sample takes, int64 [samples]."""
        raise NotImplementedError

    def too_long(self) -> np.ndarray:
        """Which samples a row has no room for, bool [samples]."""
        return self.needed() > self.capacity

    def tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n], trained [n]) of a sample, as far as a row has room for it."""
        raise NotImplementedError

    def sample_row(self, samples: Sequence[int]) -> dict[str, np.ndarray]:
        """The arrays of a row of these samples."""
        raise NotImplementedError

    def _usable(self, strategy: str) -> np.ndarray:
        """The samples that fit, or are cut, and then still have a token that is trained: bool [samples]."""
        usable, long = self.stores.num_trained > 0, self.too_long()
        if not usable.all():  # the first token of a text is all that is trained, and nothing predicts it
            self._notes.append(f"{self._named(~usable)} are left out, having no token that is trained")
        if not long.any():
            return usable
        named = f"{self._named(long)} of {len(long)} samples are longer than {self.room}"
        if strategy == "raise":
            cure = "Raise --seq-length, or choose --excess-length-strategy drop or truncate"
            rule = "must fit into a row (--excess-length-strategy raise)"
            raise DataError(problem("Every sample", Words(named), rule, cure))
        if strategy == "drop":
            self._notes.append(f"{named}, and are left out (--excess-length-strategy drop)")
            return usable & ~long
        cut = lost = 0
        for sample in np.flatnonzero(usable & long).tolist():
            left = int(self.tokens(sample)[1].sum())
            usable[sample] = left > 0
            lost += left == 0
            cut += 0 < left < self.stores.num_trained[sample]
        self._notes.append(
            f"{named}, and are cut: {cut} of them within what is trained; {lost} have nothing of that left and are "
            f"left out"
        )
        return usable

    def _named(self, chosen: np.ndarray) -> str:
        """How many samples are chosen, and where some of them are."""
        numbers = np.flatnonzero(chosen).tolist()
        return f"{len(numbers)} ({', '.join(map(self.stores.where, numbers[:FEW]))}{', ...' * (len(numbers) > FEW)})"

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self.packer.num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index` of the first epoch."""
        return self.in_epoch(0, index)

    def in_epoch(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Row `index` of an epoch, as the class describes."""
        return self.sample_row(self.kept[self._packing(epoch).row(index)].tolist())

    def describe(self, name: str) -> list[str]:
        """Lines for the user: what was read, how it is packed, what is left out, and a sample with its mask."""
        tokens = int(np.minimum(self.needed(), self.capacity)[self.kept].sum())
        filled = f", {tokens / (len(self) * self.capacity):.1%} of their tokens" * self.packer.pack
        lines = [f"{name}: {len(self.kept)} samples in {len(self)} rows{filled}"]
        lines += [f"  {line}" for line in (*self.stores.notes, *self._notes)]
        if self.decode is not None:
            sample = int(self.kept[0])
            lines.append(f"  {self.stores.where(sample)}, of which the model learns what is marked as trained:")
            lines += [f"  {line}" for line in preview(*self.tokens(sample), self.decode)]
        return lines


class WeightedDataset:
    """Rows of several datasets, in proportion to weights, as of a corpus. An epoch has as many rows as all have in one.

    Of each, rows are taken in the order of its own epochs, so that none comes again before the others have come.
    """

    def __init__(self, datasets: Sequence[InstructionDataset], weights: Sequence[float]):
        self.datasets, self.files = datasets, [file for each in datasets for file in each.files]
        self._index = blend_index(weights, sum(map(len, datasets)))
        self._taken = self._index.counts_before(len(self))

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self._index)

    def in_epoch(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Row `index` of an epoch."""
        number, place = self._index.locate(index)
        dataset = self.datasets[number]
        return dataset.in_epoch(*divmod(epoch * int(self._taken[number]) + place, len(dataset)))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index` of the first epoch."""
        return self.in_epoch(0, index)

    def describe(self, name: str) -> list[str]:
        """Lines for the user, of each dataset."""
        lines = []
        for dataset, taken in zip(self.datasets, self._taken.tolist()):
            first, *rest = dataset.describe(f"{name}, {', '.join(dataset.files)}")
            lines += [f"{first}, of which {taken} are taken an epoch", *rest]
        return lines


class PackedDataset(InstructionDataset):
    """Rows are dicts over s = seq_length tokens:

    input_ids [s] int64; labels [s] int64, the next token; loss_mask [s] float32, the sample's weight where the next
    token is trained, else 0; positions [s] int64, from 0 in each sample; documents [s] int32, the number of each
    token's sample in its row, and one more for padding. Rows of one sample have no documents.
    """

    def __init__(self, stores: Stores, *, seq_length: int, pack: bool = True, **options: Any):
        """seq_length: tokens of a row. The rest: see InstructionDataset."""
        self.seq_length, self.pack = seq_length, pack
        super().__init__(stores, pack=pack, **options)

    @property
    def capacity(self) -> int:
        """Tokens that are read; the last of a sample is a label alone."""
        return self.seq_length

    @property
    def room(self) -> str:
        """The length of a row, for messages."""
        return f"--seq-length {self.seq_length} (and one token)"

    def needed(self) -> np.ndarray:
        """Tokens that are read."""
        return np.maximum(self.stores.lengths - 1, 1)

    def tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """The beginning of a sample, with one token more than a row has."""
        ids, trained = self.stores.sample(sample)
        ids, trained = ids[: self.seq_length + 1], trained[: self.seq_length + 1].copy()
        trained[:1] = False  # no token comes before the first, so none predicts it
        return ids, trained

    def sample_row(self, samples: Sequence[int]) -> dict[str, np.ndarray]:
        """A row, as the class describes."""
        inputs = np.full(self.seq_length, self.pad, np.int64)
        labels, positions = np.zeros(self.seq_length, np.int64), np.arange(self.seq_length)
        mask, documents = np.zeros(self.seq_length, np.float32), np.zeros(self.seq_length, np.int32)
        begin = number = 0
        for number, sample in enumerate(samples, 1):
            ids, trained = self.tokens(sample)
            end = begin + len(ids) - 1
            inputs[begin:end], labels[begin:end] = ids[:-1], ids[1:]
            mask[begin:end] = trained[1:] * self.stores.weights[sample]
            positions[begin:end] -= begin
            documents[begin:end] = number - 1
            begin = end
        positions[begin:] -= begin
        documents[begin:] = number
        row: dict[str, np.ndarray] = {
            "input_ids": inputs, "labels": labels, "loss_mask": mask, "positions": positions
        }  # fmt: skip
        return row | {"documents": documents} if self.pack else row


class PairDataset(InstructionDataset):
    """Samples for an encoder and a decoder, one a row: the decoder has what is trained, the encoder all before it.

    Dicts over s = seq_length and d = decoder_seq_length tokens: input_ids [s] int64; decoder_input_ids [d] int64,
    `start` and then the answer; labels [d] int64, the answer with its end; loss_mask [d] float32, the sample's weight
    for tokens; padding_mask [s] int64, 1 for tokens.
    """

    def __init__(self, stores: Stores, *, seq_length: int, decoder_seq_length: int, start: int, **options: Any):
        """start: the token before the decoder's first. The rest: see InstructionDataset."""
        self.seq_length, self.decoder_seq_length, self.start = seq_length, decoder_seq_length, start
        super().__init__(stores, **{**options, "pack": False})

    @property
    def capacity(self) -> int:
        """One sample."""
        return 1

    @property
    def room(self) -> str:
        """The room of a row, for messages."""
        return f"--seq-length {self.seq_length} or, of the answer, --decoder-seq-length {self.decoder_seq_length}"

    def needed(self) -> np.ndarray:
        """One each."""
        return np.ones(len(self.stores), np.int64)

    def too_long(self) -> np.ndarray:
        """Of the prompt, or of the answer."""
        sizes = np.array([self._sizes(sample) for sample in range(len(self.stores))])
        return np.any(sizes > (self.seq_length, self.decoder_seq_length), axis=1)

    def _sizes(self, sample: int) -> tuple[int, int]:
        trained = self.stores.sample(sample)[1]
        first = int(trained.argmax())
        return first, int(trained[first:].sum())

    def tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """The beginning of the prompt, and that of the answer."""
        ids, trained = self.stores.sample(sample)
        first = int(trained.argmax())
        prompt, answer = ids[: min(first, self.seq_length)], ids[first:][trained[first:]][: self.decoder_seq_length]
        return np.concatenate((prompt, answer)), np.arange(len(prompt) + len(answer)) >= len(prompt)

    def sample_row(self, samples: Sequence[int]) -> dict[str, np.ndarray]:
        """A row, as the class describes."""
        (sample,) = samples
        ids, trained = self.tokens(sample)
        prompt, answer = ids[~trained], ids[trained]
        inputs, padding = np.full(self.seq_length, self.pad, np.int64), np.zeros(self.seq_length, np.int64)
        decoder, labels = (np.full(self.decoder_seq_length, fill, np.int64) for fill in (self.pad, -1))
        mask, size = np.zeros(self.decoder_seq_length, np.float32), len(answer)
        inputs[: len(prompt)], padding[: len(prompt)] = prompt, 1
        decoder[0], decoder[1:size], labels[:size] = self.start, answer[:-1], answer
        mask[:size] = self.stores.weights[sample]
        return {
            "input_ids": inputs, "decoder_input_ids": decoder, "labels": labels, "loss_mask": mask,
            "padding_mask": padding,
        }  # fmt: skip
