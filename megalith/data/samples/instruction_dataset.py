"""Samples of chats and completions for supervised finetuning: packed rows of GPT, pairs of an encoder and a decoder."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.config.flags.text import Words
from megalith.data.instructions.packing import Packer, Packing
from megalith.data.instructions.preview import preview
from megalith.data.instructions.store import InstructionStore

FEW = 5  # lines named in a message


class InstructionDataset:
    """Random access to rows of whole samples; an epoch has every sample once, in an order of (seed, epoch).

    splits_documents of the factory is False: `documents` counts samples of the store.
    """

    def __init__(
        self,
        store: InstructionStore,
        documents: tuple[int, int] | None = None,
        num_samples: int | None = None,
        *,
        seed: int = 1234,
        pad: int = 0,
        pack: bool = True,
        excess_length_strategy: str = "drop",
        decode: Callable[[Any], str] | None = None,
    ):
        """Rows of samples documents[0] to documents[1] - 1 of `store` (default: all), epoch after epoch.

        The dataset has whole epochs until it has num_samples (None: one epoch). pad: the token behind the samples of a
        row. excess_length_strategy: what becomes of samples that are longer than a row, "drop", "truncate" or "raise".
        decode: tokens to text, for `preview`. Raises DataError where no sample is left, or by "raise".
        """
        self.store, self.pad, self.decode = store, pad, decode
        begin, end = documents or (0, len(store))
        self.kept = begin + np.flatnonzero(self._usable(np.arange(begin, end), excess_length_strategy))
        if not len(self.kept):
            what, found = store.prefix, Words(f"{end - begin} samples, all left out")
            raise DataError(problem(what, found, "must have a sample that can be learned from", "See the lines above"))
        self.packer = Packer(np.minimum(self._needed(self.kept), self.capacity), self.capacity, seed, pack=pack)
        self.epochs = max(1, -(-(num_samples or 0) // self.packer.num_rows))
        self._packing = functools.lru_cache(maxsize=2)(self.packer.epoch)

    @property
    def capacity(self) -> int:
        """Tokens of a row, in the measure of `_needed`."""
        raise NotImplementedError

    def _needed(self, samples: np.ndarray) -> np.ndarray:
        """How much of a row each of these samples takes, int64 [n]."""
        raise NotImplementedError

    def _tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n], trained [n]) of a sample, as far as a row has room for it."""
        raise NotImplementedError

    def _is_too_long(self, samples: np.ndarray) -> np.ndarray:
        """bool [n]: which samples a row has no room for."""
        return self._needed(samples) > self.capacity

    def _usable(self, samples: np.ndarray, strategy: str) -> np.ndarray:
        """bool [n]: the samples that fit, or are cut, and then still have a token that is trained; the rest is told."""
        long, usable = self._is_too_long(samples), np.ones(len(samples), bool)
        rows = f"longer than {self.room}"
        if long.any() and strategy == "raise":
            rule, found = f"must hold no sample {rows} (--excess-length-strategy raise)", self._named(samples[long])
            cure = "Raise --seq-length, or choose --excess-length-strategy drop or truncate"
            raise DataError(problem(self.store.prefix, Words(found), rule, cure))
        if strategy == "drop":
            usable &= ~long
            if long.any():
                self._tell(f"{self._named(samples[long])} of {len(samples)} samples are left out, being {rows}")
        elif long.any():
            cut, without = 0, []
            for place in np.flatnonzero(long).tolist():
                whole = int(self.store.sample(samples[place])[1].sum())
                left = int(self._tokens(samples[place])[1].sum())
                cut += 0 < left < whole
                if not left:
                    usable[place], without = False, [*without, samples[place]]
            inside = f"{cut} of them within what the assistant writes"
            lost = f"; {len(without)} have nothing of it left and are left out" * bool(without)
            self._tell(f"{self._named(samples[long])} of {len(samples)} samples are cut, being {rows}: {inside}{lost}")
        starts, last = self.store.ends[samples], self.store.num_tokens - 1
        alone = self.store.trained[starts] & ~self.store.trained[np.minimum(starts + 1, last)]
        empty = [place for place in np.flatnonzero(usable & alone) if not self._tokens(samples[place])[1].any()]
        if empty:  # the first token of a text, which nothing predicts, is all that is trained
            usable[empty] = False
            self._tell(f"{self._named(samples[empty])} are left out: they have no token that is trained")
        return usable

    @property
    def room(self) -> str:
        """The length of a row, for messages."""
        raise NotImplementedError

    def _named(self, samples: Sequence[int] | np.ndarray) -> str:
        lines = self.store.lines[np.asarray(samples)]
        more = ", ..." * (len(lines) > FEW)
        return f"{len(lines)} (line{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:FEW]))}{more})"

    def _tell(self, line: str) -> None:
        warnings.warn(f"{self.store.prefix}: {line}", stacklevel=4)

    def __len__(self) -> int:
        """Rows of all epochs."""
        return self.epochs * self.packer.num_rows

    @property
    def samples_per_epoch(self) -> int:
        """Rows of an epoch."""
        return self.packer.num_rows

    def row(self, index: int) -> np.ndarray:
        """The numbers in the store of the samples in a row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.store.prefix}, which has {len(self)}")
        epoch, number = divmod(index, self.packer.num_rows)
        packing: Packing = self._packing(epoch)
        return self.kept[packing.row(number)]

    def preview(self) -> Iterator[str]:
        """Lines that show the first sample, with what is trained marked."""
        sample = int(self.row(0)[0])
        yield f"{self.store.prefix}:{self.store.lines[sample]}, a sample of {self.store.lengths[sample]} tokens:"
        if self.decode is not None:
            yield from preview(*self._tokens(sample), self.decode)


class PackedDataset(InstructionDataset):
    """Rows are dicts over s = seq_length tokens:

    input_ids [s] int64; labels [s] int64, the next token; loss_mask [s] float32, the sample's weight where the next
    token is trained, else 0; positions [s] int64, from 0 in each sample; documents [s] int32, the number of each
    token's sample in its row, and one more for padding. Rows of one sample have no documents.
    """

    def __init__(self, store: InstructionStore, *arguments: Any, seq_length: int, pack: bool = True, **options: Any):
        """seq_length: tokens of a row. The rest: see InstructionDataset."""
        self.seq_length, self.pack = seq_length, pack
        super().__init__(store, *arguments, pack=pack, **options)

    @property
    def capacity(self) -> int:
        """Tokens that are read; the last of a sample is a label alone."""
        return self.seq_length

    @property
    def room(self) -> str:
        """The length of a row, for messages."""
        return f"--seq-length {self.seq_length} and one token"

    def _needed(self, samples: np.ndarray) -> np.ndarray:
        return np.maximum(self.store.lengths[samples] - 1, 1)

    def _tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        ids, trained = self.store.sample(sample)
        ids, trained = ids[: self.seq_length + 1], trained[: self.seq_length + 1].copy()
        trained[:1] = False  # no token comes before the first, so none predicts it
        return ids, trained

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`, as the class describes."""
        inputs = np.full(self.seq_length, self.pad, np.int64)
        labels, positions = np.zeros(self.seq_length, np.int64), np.arange(self.seq_length)
        mask, documents = np.zeros(self.seq_length, np.float32), np.zeros(self.seq_length, np.int32)
        begin = number = 0
        for number, sample in enumerate(self.row(index).tolist(), 1):
            ids, trained = self._tokens(sample)
            end = begin + len(ids) - 1
            inputs[begin:end], labels[begin:end] = ids[:-1], ids[1:]
            mask[begin:end] = trained[1:] * self.store.weights[sample]
            positions[begin:end] -= begin
            documents[begin:end] = number - 1
            begin = end
        positions[begin:] -= begin
        documents[begin:] = number
        row = {"input_ids": inputs, "labels": labels, "loss_mask": mask, "positions": positions}
        return row | {"documents": documents} if self.pack else row


class PairDataset(InstructionDataset):
    """Samples for an encoder and a decoder, one a row: the decoder has what is trained, the encoder all before it.

    Dicts over s = seq_length and d = decoder_seq_length tokens: input_ids [s] int64; decoder_input_ids [d] int64,
    `start` and then the answer; labels [d] int64, the answer with its end; loss_mask [d] float32, the sample's weight
    for tokens; padding_mask [s] int64, 1 for tokens.
    """

    def __init__(
        self, store: InstructionStore, *arguments: Any, seq_length: int, decoder_seq_length: int, start: int,
        **options: Any,
    ):  # fmt: skip
        """start: the token before the decoder's first. The rest: see InstructionDataset."""
        self.seq_length, self.decoder_seq_length, self.start = seq_length, decoder_seq_length, start
        super().__init__(store, *arguments, **{**options, "pack": False})

    @property
    def capacity(self) -> int:
        """One sample."""
        return 1

    @property
    def room(self) -> str:
        """The length of a row, for messages."""
        return f"--seq-length {self.seq_length} or, of the answer, --decoder-seq-length {self.decoder_seq_length}"

    def _needed(self, samples: np.ndarray) -> np.ndarray:
        return np.ones(len(samples), np.int64)

    def _is_too_long(self, samples: np.ndarray) -> np.ndarray:
        sizes = np.array([self._sizes(sample) for sample in samples.tolist()]).reshape(-1, 2)
        return (sizes > (self.seq_length, self.decoder_seq_length)).any(axis=1)

    def _sizes(self, sample: int) -> tuple[int, int]:
        trained = self.store.sample(sample)[1]
        first = int(trained.argmax())
        return first, int(trained[first:].sum())

    def _tokens(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """What a row has room for: the beginning of the prompt, and that of the answer."""
        ids, trained = self.store.sample(sample)
        first = int(trained.argmax())
        prompt, answer = ids[: min(first, self.seq_length)], ids[first:][trained[first:]][: self.decoder_seq_length]
        return np.concatenate((prompt, answer)), np.arange(len(prompt) + len(answer)) >= len(prompt)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`, as the class describes."""
        (sample,) = self.row(index).tolist()
        ids, trained = self._tokens(sample)
        prompt, answer = ids[~trained], ids[trained]
        inputs, padding = np.full(self.seq_length, self.pad, np.int64), np.zeros(self.seq_length, np.int64)
        decoder, labels = (np.full(self.decoder_seq_length, fill, np.int64) for fill in (self.pad, -1))
        mask, size = np.zeros(self.decoder_seq_length, np.float32), len(answer)
        inputs[: len(prompt)], padding[: len(prompt)] = prompt, 1
        decoder[0], decoder[1:size], labels[:size] = self.start, answer[:-1], answer
        mask[:size] = self.store.weights[sample]
        return {
            "input_ids": inputs, "decoder_input_ids": decoder, "labels": labels, "loss_mask": mask,
            "padding_mask": padding,
        }  # fmt: skip
