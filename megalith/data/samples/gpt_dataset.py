"""Samples of a language model: seq_length + 1 tokens in a row out of shuffled documents, in Megatron's order."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from megalith.common.errors import ConfigError, DataError
from megalith.config.run import RunConfig
from megalith.data.samples import gpt_index
from megalith.data.samples.dataset_factory import DatasetFactory
from megalith.data.samples.index_cache import cache_key, load_or_build

SMALL = 1 << 14  # indices of fewer entries than this are quicker to build than to read


class GPTDataset:
    """Random access to samples, each a dict of numpy arrays over s = seq_length tokens:

    input_ids [s] int64; labels [s] int64, the inputs shifted by one; loss_mask [s] float32; positions [s] int64; and
    with reset_attention_mask documents [s] int32, the number of each token's document, from 0 in the sample. Arrays may
    be shared between samples and are read-only where they are. Indices are built (or mapped from the cache) on first
    use, or by `prepare()`.
    """

    def __init__(
        self,
        indexed: Any,
        documents: tuple[int, int] | None = None,
        num_samples: int | None = None,
        *,
        seq_length: int,
        seed: int = 1234,
        eod: int | None = None,
        vocab_size: int | None = None,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        eod_mask_loss: bool = False,
        cache_folders: Sequence[str | os.PathLike] = (),
    ):
        """Samples of sequences documents[0] to documents[1] - 1 of `indexed` (default: all).

        The dataset repeats its documents until it has num_samples (None: one epoch) and may hold some more. Raises
        DataError where there are no tokens, and when a sample is read that holds an id of vocab_size or more.
        """
        begin, end = documents or (0, len(indexed))
        self.indexed, self.seq_length, self.eod = indexed, seq_length, eod
        self.reset_position_ids, self.reset_attention_mask = reset_position_ids, reset_attention_mask
        self.eod_mask_loss = eod_mask_loss
        self._finds_documents = reset_position_ids or reset_attention_mask or eod_mask_loss
        if self._finds_documents and eod is None:
            raise ConfigError(
                "--reset-position-ids, --reset-attention-mask and --eod-mask-loss look for end-of-document tokens, and "
                "this tokenizer has none; choose a tokenizer that has one, or leave the flags out"
            )
        self.plan = gpt_index.plan(begin, end, indexed.tokens_between(begin, end), num_samples, seq_length, seed)
        # in this dtype a negative id is beyond every vocabulary
        self._unsigned = np.dtype(f"u{indexed.dtype.itemsize}")
        self._limit = vocab_size if vocab_size and vocab_size <= np.iinfo(indexed.dtype).max else None
        self.cache_folders = cache_folders
        self._lock = threading.Lock()
        self._indices: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._ones, self._range = np.ones(seq_length, np.float32), np.arange(seq_length)
        self._ones.flags.writeable = self._range.flags.writeable = False

    def __len__(self) -> int:
        """Samples in the dataset: at least num_samples."""
        return self.plan.samples

    def prepare(self) -> GPTDataset:
        """Build the indices now, or map them from the cache. Safe in threads and in several processes at once."""
        with self._lock:
            if self._indices is None:
                documents, samples, order = self._build()
                self._indices = documents, samples.reshape(-1), order
        return self

    def _build(self) -> Sequence[np.ndarray]:
        plan, lengths = self.plan, self.indexed.lengths
        entries = (plan.end - plan.begin) * plan.epochs
        if entries + plan.samples < SMALL or not self.cache_folders:
            return gpt_index.build(plan, lengths)
        dtypes = (np.int32 if size < 2**31 else np.int64 for size in (plan.end, entries))
        layout = (
            ("documents", (entries,), next(dtypes)),
            ("samples", (plan.samples + 1, 2), next(dtypes)),
            ("order", (plan.samples,), np.uint32 if plan.samples < 2**32 - 2 else np.int64),
        )
        key = cache_key("gpt index 1", plan, lengths[plan.begin : plan.end])
        return load_or_build(key, layout, lambda: gpt_index.build(plan, lengths), self.cache_folders)

    def locate(self, index: int) -> tuple[list[int], int]:
        """The sequences of `indexed` that hold the seq_length + 1 tokens of a sample, and its offset in the first."""
        if not 0 <= index < self.plan.samples:
            raise IndexError(f"sample {index} of {self.indexed.prefix}, which has {self.plan.samples}")
        documents, samples, order = self._indices or self.prepare()._indices  # type: ignore[misc]
        row = 2 * order.item(index)  # of `samples`, which prepare() flattens: (document, offset) of each sample
        return documents[samples.item(row) : samples.item(row + 2) + 1].tolist(), samples.item(row + 1)

    def tokens(self, index: int) -> np.ndarray:
        """The seq_length + 1 tokens of a sample, int64."""
        numbers, offset = self.locate(index)
        text = self.indexed.join(numbers, offset, self.seq_length + 1)
        if self._limit:  # half a microsecond, against an index error on the device
            unsigned = text.view(self._unsigned)
            if unsigned.item(unsigned.argmax()) >= self._limit:
                raise DataError(
                    f"{self.indexed.prefix}, sequences {numbers}: tokens {text.min()} to {text.max()}, but the "
                    f"vocabulary has {self._limit}; the data was made with another tokenizer, or is damaged"
                )
        return text.astype(np.int64)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`, as the class describes."""
        text = self.tokens(index)
        sample = {"input_ids": text[:-1], "labels": text[1:], "loss_mask": self._ones, "positions": self._range}
        if self._finds_documents:
            self._add_boundaries(sample)
        return sample

    def _add_boundaries(self, sample: dict[str, np.ndarray]) -> None:
        """Masks and positions that follow from end-of-document tokens; such a token belongs to the document it ends."""
        ends = sample["input_ids"] == self.eod
        if self.eod_mask_loss:
            sample["loss_mask"] = (~ends).astype(np.float32)
        if self.reset_position_ids or self.reset_attention_mask:
            documents = np.zeros(self.seq_length, np.int32)
            np.cumsum(ends[:-1], out=documents[1:])
            if self.reset_attention_mask:
                sample["documents"] = documents
            if self.reset_position_ids:
                starts = np.concatenate(([0], np.flatnonzero(ends) + 1))
                sample["positions"] = self._range - starts[documents]


def options(config: RunConfig, tokenizer: Any) -> dict[str, Any]:
    """Arguments of a GPTDataset that are not those of all datasets."""
    data = config.data
    return {
        "eod": getattr(tokenizer, "eod", None),
        "vocab_size": getattr(tokenizer, "vocab_size", None),
        "reset_position_ids": data.reset_position_ids,
        "reset_attention_mask": data.reset_attention_mask,
        "eod_mask_loss": data.eod_mask_loss,
    }


from_config = DatasetFactory(GPTDataset, options)
