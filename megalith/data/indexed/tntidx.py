"""The old `lazy` and `cached` indexed dataset of Megatron before mmap ("TNTIDX", from fairseq): reader and conversion.

Layout of the .idx, little-endian: magic 8 bytes; uint64 version, dtype code, element size, items N, sizes s, document
entries D; then int64 arrays dim_offsets [N + 1], data_offsets [N + 1] in elements, sizes [s], documents [D]. Both
names are one format: only Megatron's reader differed. Only one-dimensional items are read (s == N), which is all that
Megatron wrote.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import numpy as np

from .format import BLOCK, DataError, dtype_of_code, refuse_pointer, resolve_prefix
from .reader import IndexedDataset, map_file
from .writer import IndexedWriter

MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<8s6Q")


class TntidxDataset:
    """Reads like IndexedDataset: lengths, document_indices, [i], get; every entry is checked on opening."""

    def __init__(self, prefix: str | os.PathLike, *, float_codes: str | None = "legacy"):
        """Open `prefix`.bin and `prefix`.idx.

        float_codes: as IndexedDataset's; these files are old, so "legacy" is the default.
        """
        self.prefix = resolve_prefix(prefix)
        self.index_path, self.bin_path = self.prefix + ".idx", self.prefix + ".bin"
        self.bin_bytes = os.stat(self.bin_path).st_size
        data = map_file(self.index_path)
        if len(data) < HEADER.size:
            raise self._error(len(data), f"the file ends inside its header of {HEADER.size} bytes; it is truncated")
        magic, version, code, self._element, items, sizes, entries = HEADER.unpack_from(data)
        if magic != MAGIC:
            kind = "an mmap dataset already" if magic[:7] == b"MMIDIDX" else "not a lazy or cached index"
            raise self._error(0, f"magic {magic!r} where {MAGIC!r} belongs: {kind}")
        if version != 1:
            raise self._error(8, f"version {version}; only version 1 exists")
        self.dtype = dtype_of_code(code, float_codes, f"{self.index_path}, offset 16")
        wrong_float = code == 6 and self._element == 4  # the old table gave np.float 4 bytes
        if self._element != self.dtype.itemsize and not wrong_float:
            raise self._error(24, f"elements of {self._element} bytes, but {self.dtype} has {self.dtype.itemsize}")
        if sizes != items:
            raise self._error(40, f"{sizes} sizes for {items} items; items of several dimensions are not read")
        expected = HEADER.size + 8 * (2 * (items + 1) + sizes + entries)
        if len(data) != expected or entries < 1:
            needed = f"{items} items and {entries} document entries take {expected} bytes"
            raise self._error(32, f"{needed}, the file has {len(data)}")
        offset = HEADER.size + 8 * (items + 1)
        self._offsets = np.frombuffer(data, "<i8", items + 1, offset)
        self.lengths = np.frombuffer(data, "<i8", items, offset + 8 * (items + 1))
        self.document_indices = np.frombuffer(data, "<i8", entries, offset + 8 * (2 * items + 1))
        self._check(offset)
        self._data = np.frombuffer(map_file(self.bin_path), np.uint8)

    def _error(self, offset: int, meaning: str) -> DataError:
        return DataError(f"{self.index_path}, offset {offset}: {meaning}")

    def _check(self, offset: int) -> None:
        elements = self.lengths * (self.dtype.itemsize // self._element)
        wrong = np.flatnonzero((self.lengths < 0) | (np.diff(self._offsets) != elements))
        if wrong.size:
            number = int(wrong[0])
            found = f"item {number} of {self.lengths[number]} tokens does not end where the next one begins"
            raise self._error(offset + 8 * number, f"{found}; the file is damaged")
        ends = int(self._offsets[0]), int(self._offsets[-1]) * self._element
        if ends != (0, self.bin_bytes):
            refuse_pointer(self.bin_path)
            found = f"data from {ends[0]} to byte {ends[1]}, but {self.bin_path} has {self.bin_bytes}"
            raise self._error(offset, f"{found}; one of the files is truncated, or belongs to another pair")
        documents = self.document_indices
        if documents[0] != 0 or documents[-1] != len(self) or (np.diff(documents) < 0).any():
            rule = f"the document table must rise from 0 to {len(self)} items"
            raise self._error(offset + 8 * (2 * len(self) + 1), rule)

    @property
    def num_documents(self) -> int:
        """Documents in the file."""
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the file."""
        return self.bin_bytes // self.dtype.itemsize

    def tokens_between(self, begin: int, end: int) -> int:
        """Tokens of the items begin to end - 1."""
        return int(self._offsets[end] - self._offsets[begin]) * self._element // self.dtype.itemsize

    def __len__(self) -> int:
        """Items (sequences) in the file."""
        return self.lengths.size

    def __getitem__(self, index):
        """Tokens of item `index`, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self.get(number) for number in range(*index.indices(len(self)))]
        return self.get(index + len(self) if index < 0 else index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` tokens (default: all that follow) of item `index` from `offset` on."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {self.prefix}, which has {len(self)}")
        count = self.lengths.item(index) - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > self.lengths.item(index):
            wanted = f"tokens {offset} to {offset + count} of item {index}"
            raise IndexError(f"{wanted}, which has {self.lengths.item(index)}")
        begin = self._offsets.item(index) * self._element + offset * self.dtype.itemsize
        return self._data[begin : begin + count * self.dtype.itemsize].view(self.dtype)

    def join(self, numbers: list[int], begin: int, count: int) -> np.ndarray:
        """`count` tokens from token `begin` of the first of the items `numbers` on."""
        return np.concatenate([self.get(number) for number in numbers])[begin : begin + count]


def sniff(prefix: str | os.PathLike) -> str:
    """'mmap' or 'cached', by the first bytes of the .idx; anything else is a DataError."""
    path = resolve_prefix(prefix) + ".idx"
    with open(path, "rb") as file:
        magic = file.read(8)
    if magic == MAGIC:
        return "cached"
    if magic == b"MMIDIDX\x00":
        return "mmap"
    refuse_pointer(path)
    raise DataError(f"{path}, offset 0: {magic!r} begins neither an mmap (MMIDIDX) nor a lazy/cached (TNTIDX) index")


def open_indexed(prefix: str | os.PathLike, reader: str = "mmap") -> IndexedDataset | TntidxDataset:
    """Open either format. reader: how the mmap format's tokens are read, see IndexedDataset."""
    return TntidxDataset(prefix) if sniff(prefix) == "cached" else IndexedDataset(prefix, reader=reader)


def convert(
    prefix: str | os.PathLike,
    output: str | os.PathLike,
    dtype=None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Write an mmap dataset `output` with the items and documents of a lazy/cached one.

    dtype: of the tokens (default: the same).
    ready: called before files are put in place; where it raises, none is.
    """
    source = TntidxDataset(prefix)
    per_document = np.diff(source.document_indices)
    with IndexedWriter(output, dtype or source.dtype) as writer:
        item = document = 0
        while document < len(per_document):
            ends = np.cumsum(source.lengths[item : item + BLOCK])
            fitting = max(1, int(np.searchsorted(ends, 16 * BLOCK, "right")))  # items of about 64 MiB together
            last = int(np.searchsorted(source.document_indices, item + fitting, "right")) - 1
            last = max(last, document + 1)  # at least one document, however long
            end = int(source.document_indices[last])
            begin, stop = (int(source._offsets[index]) * source._element for index in (item, end))
            tokens = source._data[begin:stop].view(source.dtype)
            writer.add_many(tokens, source.lengths[item:end], per_document[document:last])
            item, document = end, last
        ready()
