"""The base of the datasets over sentences (BERT, T5, ICT): a mapping built once, cached by content, read by number."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import DataError
from megalith.data.samples.index_cache import cache_key, load_or_build


class SentenceDataset:
    """Samples of successive sentences; a subclass turns rows of `mapping` into samples.

    `documents` counts documents, not sequences.
    """

    def __init__(
        self, indexed: Any, documents: tuple[int, int] | None, seed: int, cache_folders: Sequence[str | os.PathLike]
    ):
        """Documents documents[0] to documents[1] - 1 of `indexed` (default: all)."""
        begin, end = documents or (0, indexed.num_documents)
        if begin == end:
            raise DataError(
                f"{indexed.prefix}: documents {begin} to {end} are an empty range, so there is nothing to sample from"
            )
        self.indexed, self.seed, self.cache_folders = indexed, seed, cache_folders
        self.documents = np.array(indexed.document_indices[begin : end + 1], np.int64)
        self.first_document = begin
        self._lock = threading.Lock()
        self._mapping: np.ndarray | None = None

    def mapping_recipe(self) -> tuple[tuple, int, Callable[[], np.ndarray]]:
        """What the mapping depends on, its number of columns, and the function that builds it; of a subclass."""
        raise NotImplementedError

    @property
    def mapping(self) -> np.ndarray:
        """The rows of the sample mapping; built, or mapped from the cache, on first use."""
        if self._mapping is None:
            self.prepare()
        return self._mapping  # type: ignore[return-value]

    def prepare(self) -> None:
        """Build the mapping now. Safe in threads and in several processes at once."""
        with self._lock:
            if self._mapping is not None:
                return
            parts, columns, build = self.mapping_recipe()
            if self.cache_folders:
                first, last = int(self.documents[0]), int(self.documents[-1])
                key = cache_key(type(self).__name__, 1, parts, self.documents, self.indexed.lengths[first:last])
                dtype = np.uint32 if len(self.indexed) <= np.iinfo(np.uint32).max else np.uint64
                layout = (("mapping", (-1, columns), dtype),)
                self._mapping = load_or_build(key, layout, lambda: [build()], self.cache_folders)[0]
            else:
                self._mapping = build()

    def __len__(self) -> int:
        """Samples of whole epochs: at least num_samples."""
        return len(self.mapping)

    def sentences(self, first: int, last: int) -> list[np.ndarray]:
        """Tokens of the sentences first to last - 1."""
        return [self.indexed.get(number) for number in range(first, last)]


def padded(values: np.ndarray | list[int], size: int, fill: int) -> np.ndarray:
    """`values` as int64 [size], padded with `fill`."""
    out = np.full(size, fill, np.int64)
    out[: len(values)] = values
    return out
