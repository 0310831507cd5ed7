"""The writer of indexed datasets: two files that appear together, complete, or not at all. Needs numpy alone."""

from __future__ import annotations

import array
import os
import pathlib
import shutil

import numpy as np

from .format import BLOCK, DTYPE_CODES, HEADER, MAGIC, DataError
from .reader import IndexedDataset


class IndexedWriter:
    """Writes `prefix`.bin and `prefix`.idx; both appear when `finish` returns, or neither.

    Memory: at most 12 bytes for each sequence.
    """

    def __init__(self, prefix: str | os.PathLike, dtype=np.int32, *, multimodal: bool = False):
        """Start a dataset of `dtype` (see `best_dtype`).

        As a context manager the writer finishes on success and cleans up on an exception.
        """
        self.dtype, self.multimodal = np.dtype(dtype), multimodal
        if self.dtype not in DTYPE_CODES:
            known = ", ".join(map(str, DTYPE_CODES))
            raise DataError(f"tokens of dtype {self.dtype} cannot be stored; the format has {known}")
        self.prefix = pathlib.Path(prefix)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._aside = self.prefix.with_name(f".{self.prefix.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
        self._file = open(f"{self._aside}.bin", "wb", buffering=1 << 20)  # noqa: SIM115 - lives as long as the writer
        self._lengths, self._documents, self._modes = array.array("i"), array.array("q", [0]), array.array("b")

    def _fit(self, tokens) -> np.ndarray:
        """`tokens` as the file's dtype; DataError where a value does not fit (numpy would wrap it round silently)."""
        tokens = np.asarray(tokens)
        if tokens.dtype == self.dtype or not tokens.size:
            return np.ascontiguousarray(tokens, self.dtype)
        converted = tokens.astype(self.dtype)
        if self.dtype.kind in "iu" and not np.array_equal(converted, tokens):
            cure = "choose the dtype by the vocabulary (best_dtype)"
            raise DataError(f"tokens from {tokens.min()} to {tokens.max()} do not fit {self.dtype}; {cure}")
        return converted

    def add_sequence(self, tokens, mode: int = 0) -> None:
        """Append one sequence to the current document."""
        tokens = self._fit(tokens)
        self._file.write(tokens.data)
        self._lengths.append(tokens.size)
        if self.multimodal:
            self._modes.append(mode)

    def end_document(self) -> None:
        """Close the current document (one without sequences is an empty document)."""
        self._documents.append(len(self._lengths))

    def add_many(self, tokens, lengths, sequences_per_document=None, modes=None) -> None:
        """Append many whole documents.

        tokens: all tokens in a row. lengths: tokens of each sequence. sequences_per_document: by default each sequence
        is a document.
        """
        tokens, lengths = self._fit(tokens), np.asarray(lengths, np.int32)
        per_document = np.ones(lengths.size, np.int64)
        if sequences_per_document is not None:
            per_document = np.asarray(sequences_per_document, np.int64)
        total = lengths.sum(dtype=np.int64)
        if total != tokens.size or per_document.sum() != lengths.size:
            counts = f"{tokens.size} tokens, {lengths.size} lengths that sum to {total}"
            raise DataError(f"{counts}, documents of {per_document.sum()} sequences: the counts disagree")
        self._extend(lengths, len(self._lengths) + np.cumsum(per_document), modes)
        self._file.write(tokens.data)

    def add_index(self, prefix: str | os.PathLike) -> None:
        """Append a whole dataset of the same dtype, as Megatron's merge does."""
        other = IndexedDataset(prefix, float_codes="core", multimodal=self.multimodal or None)
        if other.dtype != self.dtype:
            found = f"dtype {other.dtype}, but {self.prefix} has {self.dtype}"
            raise DataError(f"{other.index_path}, offset 17: {found}; only equal dtypes merge")
        self._extend(other.lengths, len(self._lengths) + other.document_indices[1:], other.modes)
        self._file.flush()
        with open(other.bin_path, "rb") as source:
            shutil.copyfileobj(source, self._file, 1 << 24)

    def _extend(self, lengths: np.ndarray, documents: np.ndarray, modes) -> None:
        self._lengths.frombytes(lengths.astype(np.intc).tobytes())
        self._documents.frombytes(documents.astype(np.int64).tobytes())
        if self.multimodal:
            modes = np.zeros(len(lengths)) if modes is None else modes
            self._modes.frombytes(np.asarray(modes, np.int8).tobytes())

    def finish(self) -> None:
        """Write the index, sync and put both files in place.

        Sequences after the last `end_document` form a last document.
        """
        if self._documents[-1] != len(self._lengths):
            self.end_document()
        lengths = np.frombuffer(self._lengths, np.intc)
        with open(f"{self._aside}.idx", "wb") as index:
            index.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[self.dtype], lengths.size, len(self._documents)))
            index.write(lengths.astype("<i4", copy=False).data)
            previous_end = 0
            for begin in range(0, lengths.size, BLOCK):
                sizes = lengths[begin : begin + BLOCK].astype("<i8") * self.dtype.itemsize
                ends = previous_end + np.cumsum(sizes)
                index.write((ends - sizes).data)
                previous_end = int(ends[-1])
            index.write(self._documents)
            index.write(self._modes)
            index.flush()
            os.fsync(index.fileno())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        pathlib.Path(f"{self.prefix}.idx").unlink(missing_ok=True)  # killed here, it would be the index of other data
        for suffix in (".bin", ".idx"):  # the index last: where it exists, the data exists
            os.replace(f"{self._aside}{suffix}", f"{self.prefix}{suffix}")

    def abandon(self) -> None:
        """Remove what was written so far."""
        self._file.close()
        for suffix in (".bin", ".idx"):
            pathlib.Path(f"{self._aside}{suffix}").unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        """Enter a `with` block."""
        return self

    def __exit__(self, kind, value, traceback) -> None:
        """Finish, or clean up after an exception."""
        if kind is None:
            self.finish()
        else:
            self.abandon()
