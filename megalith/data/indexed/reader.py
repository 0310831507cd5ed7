"""The reader of indexed datasets: by mmap or pread, checked in full before it is relied on. Needs numpy alone."""

from __future__ import annotations

import mmap
import os
import pathlib
import struct

import numpy as np

from .format import BLOCK, HEADER, MAGIC, DataError, dtype_of_code, refuse_pointer, resolve_prefix


class IndexedDataset:
    """Sequences of tokens in a file pair, read by number.

    Opening costs two stats and a few small reads: it checks the header, both file sizes and the ends of every table.
    The tables are checked in full, once, when first asked for (`lengths`, `pointers`, `document_indices`); reading a
    sequence checks the entries of that sequence.
    """

    def __init__(
        self,
        prefix: str | os.PathLike,
        *,
        reader: str = "mmap",
        float_codes: str | None = None,
        multimodal: bool | None = None,
    ):
        """Open `prefix`.bin and `prefix`.idx.

        reader: "mmap", or "pread" for network file systems, where each page fault is a round trip: one read for each
        sequence, the index in memory.
        float_codes: "core" or "legacy", needed for dtype code 7 alone.
        multimodal: None infers from the size of the .idx whether it has modes.
        Raises DataError naming file, offset and meaning.
        """
        if reader not in ("mmap", "pread"):
            raise DataError(f"reader {reader!r} is unknown; it must be mmap or pread")
        self.prefix = resolve_prefix(prefix)
        self.reader, self._float_codes, self._multimodal = reader, float_codes, multimodal
        self.index_path, self.bin_path = self.prefix + ".idx", self.prefix + ".bin"
        self._raw: tuple | None = None
        self._tokens: np.ndarray | None = None
        self._descriptor: int | None = None
        self._views: tuple | None = None
        self._verified = False
        try:
            self.bin_bytes = os.stat(self.bin_path).st_size
            with open(self.index_path, "rb", buffering=0) as file:
                self.index_bytes = os.fstat(file.fileno()).st_size
                self._read_header(file.fileno())
        except OSError as error:
            raise DataError(f"{self.prefix}: cannot be opened ({error})") from error
        except DataError:
            for path in (self.index_path, self.bin_path):
                refuse_pointer(path)
            raise

    def _error(self, offset: int, meaning: str) -> DataError:
        return DataError(f"{self.index_path}, offset {offset}: {meaning}")

    def _read_header(self, descriptor: int) -> None:
        head = os.pread(descriptor, HEADER.size, 0)
        if len(head) < HEADER.size:
            raise self._error(len(head), f"the file ends inside its header of {HEADER.size} bytes; it is truncated")
        magic, version, code, sequences, entries = HEADER.unpack(head)
        if magic != MAGIC:
            kind = "not an indexed dataset"
            if magic[:6] == b"TNTIDX":
                kind = "a lazy or cached index; `megalith data convert` makes an mmap dataset of it"
            raise self._error(0, f"magic {magic!r} where {MAGIC!r} belongs: {kind}")
        if version != 1:
            raise self._error(9, f"version {version}; only version 1 exists")
        self.dtype = dtype_of_code(code, self._float_codes, f"{self.index_path}, offset 17")
        self._itemsize = self.dtype.itemsize
        without_modes = HEADER.size + 12 * sequences + 8 * entries
        with_modes = without_modes + sequences
        allowed = {None: (without_modes, with_modes), False: (without_modes,), True: (with_modes,)}[self._multimodal]
        if self.index_bytes not in allowed:
            needed = f"{sequences} sequences and {entries} document entries take {' or '.join(map(str, allowed))} bytes"
            raise self._error(18, f"{needed}, the file has {self.index_bytes}; it is truncated or damaged")
        self.multimodal = self.index_bytes == with_modes and (sequences > 0 or bool(self._multimodal))
        self._count, self._entries = sequences, entries
        if entries < 1:
            raise self._error(26, "0 document entries; even an empty dataset has the leading 0")
        if self.bin_bytes % self._itemsize:
            cause = "it is truncated, or the index belongs to another file"
            where = f"{self.bin_path}, offset {self.bin_bytes}"
            raise DataError(f"{where}: the file ends inside a token ({self.dtype}); {cause}")
        pointers, documents = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
        table_ends = (documents, documents + 8 * (entries - 1))
        first, last = (struct.unpack("<q", os.pread(descriptor, 8, offset))[0] for offset in table_ends)
        if first != 0 or last != sequences:
            rule = f"it must run from 0 to {sequences} (sequences)"
            raise self._error(documents, f"the document table runs from {first} to {last}; {rule}")
        end = 0
        if sequences:
            length = struct.unpack("<i", os.pread(descriptor, 4, pointers - 4))[0]
            pointer = struct.unpack("<q", os.pread(descriptor, 8, documents - 8))[0]
            end = pointer + length * self._itemsize
        if end != self.bin_bytes:
            found = f"the last sequence ends at byte {end} of {self.bin_path}, which has {self.bin_bytes}"
            cause = "one of the files is truncated, or belongs to another pair"
            raise self._error(documents - 8, f"{found}; {cause}")

    def _tables(self) -> tuple:
        """(lengths, pointers, document_indices, modes) as they lie in the file; unaligned, read-only."""
        if self._raw is None:
            in_memory = self.reader == "pread"
            data = pathlib.Path(self.index_path).read_bytes() if in_memory else map_file(self.index_path)
            if len(data) != self.index_bytes:
                sizes = f"from {self.index_bytes} to {len(data)} bytes"
                raise DataError(f"{self.index_path} changed {sizes} since it was opened")
            count, pointers, documents = self._count, HEADER.size + 4 * self._count, HEADER.size + 12 * self._count
            self._raw = (
                np.frombuffer(data, "<i4", count, HEADER.size),
                np.frombuffer(data, "<i8", count, pointers),
                np.frombuffer(data, "<i8", self._entries, documents),
                np.frombuffer(data, np.int8, count, documents + 8 * self._entries) if self.multimodal else None,
            )
        return self._raw

    def verify(self) -> None:
        """Check every entry of the tables, once; DataError names the first wrong one. One pass in constant memory."""
        if self._verified:
            return
        lengths, pointers, documents, _ = self._tables()
        previous_end = 0
        for begin in range(0, self._count, BLOCK):
            sizes = lengths[begin : begin + BLOCK].astype(np.int64) * self._itemsize
            ends = previous_end + np.cumsum(sizes)
            negative = np.flatnonzero(sizes < 0)
            misplaced = np.flatnonzero(pointers[begin : begin + BLOCK] != ends - sizes)
            for wrong, table, width, meaning in (
                (negative, lengths, 4, "a sequence of negative length"),
                (misplaced, pointers, 8, "a pointer off the end of its predecessor"),
            ):
                if wrong.size:
                    number = begin + int(wrong[0])
                    offset = HEADER.size + (4 * self._count if width == 8 else 0) + width * number
                    found = f"{table[number]} at sequence {number} of {self._count}"
                    raise self._error(offset, f"{meaning}: {found}; the file is damaged")
            previous_end = int(ends[-1])
        for begin in range(0, self._entries - 1, BLOCK):
            decreases = np.flatnonzero(np.diff(documents[begin : begin + BLOCK + 1]) < 0)
            if decreases.size:
                number = begin + int(decreases[0]) + 1
                found = f"document {number} begins at sequence {documents[number]}, before its predecessor"
                offset = HEADER.size + 12 * self._count + 8 * number
                raise self._error(offset, f"{found}; the file is damaged")
        self._verified = True

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32 [S]; verified."""
        self.verify()
        return self._tables()[0]

    @property
    def pointers(self) -> np.ndarray:
        """Byte offset of each sequence in the .bin, int64 [S]; verified."""
        self.verify()
        return self._tables()[1]

    @property
    def document_indices(self) -> np.ndarray:
        """First sequence of each document, then S; int64 [documents + 1]; verified."""
        self.verify()
        return self._tables()[2]

    @property
    def modes(self) -> np.ndarray | None:
        """Mode of each sequence, int8 [S]; None for files without modes."""
        return self._tables()[3]

    @property
    def num_documents(self) -> int:
        """Documents in the file."""
        return self._entries - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the file."""
        return self.bin_bytes // self._itemsize

    def __len__(self) -> int:
        """Sequences in the file."""
        return self._count

    def tokens_between(self, begin: int, end: int) -> int:
        """Tokens of the sequences begin to end - 1, from two pointers (sequences lie without gaps)."""
        starts = self._tables()[1]
        first, last = (self.bin_bytes if index >= self._count else starts.item(index) for index in (begin, end))
        if not 0 <= first <= last <= self.bin_bytes:
            offset = HEADER.size + 4 * self._count + 8 * begin
            found = f"pointers {first} and {last} of sequences {begin} and {end} are out of order"
            raise self._error(offset, f"{found}; the file is damaged")
        return (last - first) // self._itemsize

    def __getitem__(self, index):
        """Tokens of sequence `index` (negative counts from the end), or a list of them for a slice."""
        if isinstance(index, slice):
            return [self.get(number) for number in range(*index.indices(self._count))]
        index = int(index)
        return self.get(index + self._count if index < 0 else index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` tokens (default: all that follow) of sequence `index` from `offset` on.

        Returns a read-only array [length] of the file's dtype.
        """
        if not 0 <= index < self._count:
            raise IndexError(f"sequence {index} of {self.prefix}, which has {self._count}")
        sizes, starts, _, _ = self._raw or self._tables()
        size, start = sizes.item(index), starts.item(index)
        end = starts.item(index + 1) if index + 1 < self._count else self.bin_bytes
        if not 0 <= start <= end <= self.bin_bytes or end - start != size * self._itemsize or start % self._itemsize:
            offset = HEADER.size + 4 * self._count + 8 * index
            found = f"sequence {index} of {size} tokens goes from byte {start} to {end}"
            raise self._error(offset, f"{found}; the file is damaged")
        count = size - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > size:
            wanted = f"tokens {offset} to {offset + count} of sequence {index}"
            raise IndexError(f"{wanted} of {self.prefix}, which has {size}")
        first = start // self._itemsize + offset
        if self.reader == "pread":
            return np.frombuffer(self._pread(count * self._itemsize, first * self._itemsize), self.dtype)
        if self._tokens is None:
            self._tokens = np.frombuffer(map_file(self.bin_path), self.dtype)
        return self._tokens[first : first + count]

    def join(self, numbers: list[int], begin: int, count: int) -> np.ndarray:
        """`count` tokens from token `begin` of the first of the sequences `numbers` on; a read-only array [count].

        For verified datasets: it checks nothing but the count. Concatenating slices of bytes costs a third less than
        copying arrays.
        """
        if self._views is None:
            lengths, starts, _, _ = self._tables()
            data = None if self.reader == "pread" else memoryview(map_file(self.bin_path))
            self._views = memoryview(lengths).cast("B").cast("i"), memoryview(starts).cast("B").cast("q"), data
        sizes, pointers, data = self._views
        width, parts, remaining = self._itemsize, [], count * self._itemsize
        offset = begin * width
        for number in numbers:
            first, size = pointers[number] + offset, sizes[number] * width - offset
            if size > remaining:
                size = remaining
            parts.append(self._pread(size, first) if data is None else data[first : first + size])
            remaining -= size
            offset = 0
        if remaining:
            wanted = f"{count} tokens of the sequences {numbers} of {self.prefix}"
            raise IndexError(f"{wanted}, which are {remaining // width} short")
        return np.frombuffer(b"".join(parts), self.dtype)

    def _pread(self, count: int, offset: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self.bin_path, os.O_RDONLY)
        parts = b""
        while len(parts) < count:  # a read can return less, after a signal or at 2 GiB
            part = os.pread(self._descriptor, count - len(parts), offset + len(parts))
            if not part:
                where = f"{self.bin_path}, offset {offset + len(parts)}"
                raise DataError(f"{where}: the file ends inside a sequence; it was truncated while open")
            parts += part
        return parts

    def __del__(self):
        """Close what pread opened."""
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)

    def __reduce__(self):
        """Pickle the path alone; the process that unpickles it opens the files again."""
        return _reopen, (self.prefix, self.reader, self._float_codes, self._multimodal)


def _reopen(prefix: str, reader: str, float_codes: str | None, multimodal: bool | None) -> IndexedDataset:
    return IndexedDataset(prefix, reader=reader, float_codes=float_codes, multimodal=multimodal)


def map_file(path: str):
    """The file's bytes, mapped read-only (an empty file cannot be mapped)."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
