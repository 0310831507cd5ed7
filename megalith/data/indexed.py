"""Megatron's indexed dataset (`prefix.bin` + `prefix.idx`, "MMIDIDX" version 1): reader and writer, byte for byte.

Layout of the .idx, little-endian, without padding; S sequences, D = documents + 1:

    0        9 bytes  magic b"MMIDIDX\\0\\0"        34           int32 x S  tokens of each sequence
    9        uint64   version, 1                  34 + 4S      int64 x S  byte offset of each sequence in the .bin
    17       uint8    dtype code                  34 + 12S     int64 x D  first sequence of each document, then S
    18       uint64   S                           34 + 12S+8D  int8  x S  modes; only in multimodal files, unannounced
    26       uint64   D

Needs nothing but numpy and indexed_format.py, so that both can be lifted out of the project.
"""

from __future__ import annotations

import array
import concurrent.futures
import mmap
import os
import pathlib
import shutil
import struct
from collections.abc import Iterable

import numpy as np

from .indexed_format import CODES, HEADER, MAGIC, DataError, best_dtype, dtype_of_code, resolve_prefix

__all__ = ["IndexedDataset", "IndexedWriter", "best_dtype", "open_many", "resolve_prefix"]

BLOCK = 1 << 20  # sequences looked at together: bounds the memory of every pass over an index


class IndexedDataset:
    """Sequences of tokens in a file pair, read by number.

    Opening costs two stats and a few small reads: it checks the header, both file sizes and the ends of every table. The tables
    are checked in full, once, when first asked for (`lengths`, `pointers`, `document_indices`); a single read checks its own entries.
    """

    def __init__(self, prefix: str | os.PathLike, *, reader: str = "mmap", float_codes: str | None = None, multimodal: bool | None = None):
        """Open `prefix`.bin and `prefix`.idx.

        reader: "mmap", or "pread" for network file systems, where each page fault is a round trip: one read a sequence, index in memory.
        float_codes: "core" or "legacy", needed for dtype code 7 alone.
        multimodal: None infers from the size of the .idx whether it has modes.
        Raises DataError naming file, offset and meaning.
        """
        if reader not in ("mmap", "pread"):
            raise DataError(f"reader {reader!r} is unknown; it is mmap or pread")
        self.prefix = resolve_prefix(prefix)
        self.reader, self._float_codes, self._multimodal = reader, float_codes, multimodal
        self.index_path, self.bin_path = self.prefix + ".idx", self.prefix + ".bin"
        self._raw: tuple | None = None
        self._tokens: np.ndarray | None = None
        self._descriptor: int | None = None
        self._verified = False
        try:
            self.bin_bytes = os.stat(self.bin_path).st_size
            with open(self.index_path, "rb", buffering=0) as file:
                self.index_bytes = os.fstat(file.fileno()).st_size
                self._read_header(file.fileno())
        except OSError as error:
            raise DataError(f"{self.prefix}: cannot be opened ({error})") from error

    def _fault(self, offset: int, meaning: str) -> DataError:
        return DataError(f"{self.index_path}, offset {offset}: {meaning}")

    def _read_header(self, descriptor: int) -> None:
        head = os.pread(descriptor, HEADER.size, 0)
        if len(head) < HEADER.size:
            raise self._fault(len(head), f"the file ends inside its header of {HEADER.size} bytes; it is truncated")
        magic, version, code, sequences, entries = HEADER.unpack(head)
        if magic != MAGIC:
            kind = "a lazy or cached index; megalith.data.tntidx reads and converts it" if magic[:6] == b"TNTIDX" else "no indexed dataset"
            raise self._fault(0, f"magic {magic!r} where {MAGIC!r} belongs: {kind}")
        if version != 1:
            raise self._fault(9, f"version {version}; only version 1 exists")
        self.dtype = dtype_of_code(code, self._float_codes, f"{self.index_path}, offset 17")
        self._itemsize = self.dtype.itemsize
        plain = HEADER.size + 12 * sequences + 8 * entries
        allowed = {None: (plain, plain + sequences), False: (plain,), True: (plain + sequences,)}[self._multimodal]
        if self.index_bytes not in allowed:
            sizes = " or ".join(map(str, allowed))
            raise self._fault(
                18,
                f"{sequences} sequences and {entries} document entries take {sizes} bytes, the file has {self.index_bytes}; it is "
                f"truncated or damaged",
            )
        self.multimodal = self.index_bytes == plain + sequences and (sequences > 0 or bool(self._multimodal))
        self._count, self._entries = sequences, entries
        if entries < 1:
            raise self._fault(26, "0 document entries; even an empty dataset has the leading 0")
        if self.bin_bytes % self._itemsize:
            raise DataError(
                f"{self.bin_path}, offset {self.bin_bytes}: the file ends inside a token ({self.dtype}); it is truncated, or the "
                f"index belongs to another"
            )
        pointers, documents = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
        first, last = (struct.unpack("<q", os.pread(descriptor, 8, at))[0] for at in (documents, documents + 8 * (entries - 1)))
        if first != 0 or last != sequences:
            raise self._fault(documents, f"the document table runs from {first} to {last}; it must run from 0 to {sequences} (sequences)")
        end = 0
        if sequences:
            length = struct.unpack("<i", os.pread(descriptor, 4, pointers - 4))[0]
            pointer = struct.unpack("<q", os.pread(descriptor, 8, documents - 8))[0]
            end = pointer + length * self._itemsize
        if end != self.bin_bytes:
            raise self._fault(
                documents - 8,
                f"the last sequence ends at byte {end} of {self.bin_path}, which has {self.bin_bytes}; one of the files is truncated, "
                f"or belongs to another pair",
            )

    def _tables(self) -> tuple:
        """(lengths, pointers, document_indices, modes) as they lie in the file; unaligned, read-only."""
        if self._raw is None:
            whole = self.reader == "pread"
            data = pathlib.Path(self.index_path).read_bytes() if whole else _map(self.index_path)
            if len(data) != self.index_bytes:
                raise DataError(f"{self.index_path}: changed from {self.index_bytes} to {len(data)} bytes since it was opened")
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
        carried = 0
        for begin in range(0, self._count, BLOCK):
            sizes = lengths[begin : begin + BLOCK].astype(np.int64) * self._itemsize
            ends = carried + np.cumsum(sizes)
            for wrong, table, width, meaning in (
                (np.flatnonzero(sizes < 0), lengths, 4, "a sequence of negative length"),
                (np.flatnonzero(pointers[begin : begin + BLOCK] != ends - sizes), pointers, 8, "a pointer off the end of its predecessor"),
            ):
                if wrong.size:
                    number = begin + int(wrong[0])
                    offset = HEADER.size + (4 * self._count if width == 8 else 0) + width * number
                    raise self._fault(offset, f"{meaning}: {table[number]} at sequence {number} of {self._count}; the file is damaged")
            carried = int(ends[-1])
        for begin in range(0, self._entries - 1, BLOCK):
            falls = np.flatnonzero(np.diff(documents[begin : begin + BLOCK + 1]) < 0)
            if falls.size:
                number = begin + int(falls[0]) + 1
                raise self._fault(
                    HEADER.size + 12 * self._count + 8 * number,
                    f"document {number} begins at sequence {documents[number]}, before its predecessor; the file is damaged",
                )
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
        first, last = (self.bin_bytes if at >= self._count else starts.item(at) for at in (begin, end))
        if not 0 <= first <= last <= self.bin_bytes:
            offset = HEADER.size + 4 * self._count + 8 * begin
            raise self._fault(offset, f"pointers {first} and {last} of sequences {begin} and {end} are out of order; the file is damaged")
        return (last - first) // self._itemsize

    def __getitem__(self, index):
        """Tokens of sequence `index` (negative counts from the end), or a list of them for a slice."""
        if isinstance(index, slice):
            return [self.get(number) for number in range(*index.indices(self._count))]
        index = int(index)
        return self.get(index + self._count if index < 0 else index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` tokens (default: all that follow) of sequence `index` from `offset` on; read-only [length] of the file's dtype."""
        if not 0 <= index < self._count:
            raise IndexError(f"sequence {index} of {self.prefix}, which has {self._count}")
        sizes, starts, _, _ = self._raw or self._tables()
        size, start = sizes.item(index), starts.item(index)
        end = starts.item(index + 1) if index + 1 < self._count else self.bin_bytes
        if not 0 <= start <= end <= self.bin_bytes or end - start != size * self._itemsize or start % self._itemsize:
            offset = HEADER.size + 4 * self._count + 8 * index
            raise self._fault(offset, f"sequence {index} of {size} tokens from byte {start} to {end}; the file is damaged")
        count = size - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > size:
            raise IndexError(f"tokens {offset} to {offset + count} of sequence {index} of {self.prefix}, which has {size}")
        first = start // self._itemsize + offset
        if self.reader == "pread":
            return np.frombuffer(self._pread(count * self._itemsize, first * self._itemsize), self.dtype)
        if self._tokens is None:
            self._tokens = np.frombuffer(_map(self.bin_path), self.dtype)
        return self._tokens[first : first + count]

    def _pread(self, count: int, offset: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self.bin_path, os.O_RDONLY)
        parts = b""
        while len(parts) < count:  # a signal or 2 GiB can cut a read short
            part = os.pread(self._descriptor, count - len(parts), offset + len(parts))
            if not part:
                raise DataError(f"{self.bin_path}, offset {offset + len(parts)}: the file ends inside a sequence; it was cut while open")
            parts += part
        return parts

    def __del__(self):
        """Close what pread opened."""
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)

    def __reduce__(self):
        """Pickle the path alone; the other side opens it anew."""
        return _reopen, (self.prefix, self.reader, self._float_codes, self._multimodal)


def _reopen(prefix: str, reader: str, float_codes: str | None, multimodal: bool | None) -> IndexedDataset:
    return IndexedDataset(prefix, reader=reader, float_codes=float_codes, multimodal=multimodal)


def _map(path: str):
    """The file's bytes, mapped read-only (an empty file cannot be mapped)."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


def open_many(prefixes: Iterable[str | os.PathLike], threads: int = 32, **options) -> list[IndexedDataset]:
    """Open datasets in parallel, in order; `options` as IndexedDataset takes them. The headers are read, the data is not."""
    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(lambda prefix: IndexedDataset(prefix, **options), prefixes))


class IndexedWriter:
    """Writes `prefix`.bin and `prefix`.idx; both appear when `finish` returns, or neither. 12 bytes of memory a sequence at most."""

    def __init__(self, prefix: str | os.PathLike, dtype=np.int32, *, multimodal: bool = False):
        """Start a dataset of `dtype` (see `best_dtype`). As a context manager it finishes on success and cleans up on an exception."""
        self.dtype, self.multimodal = np.dtype(dtype), multimodal
        if self.dtype not in CODES:
            raise DataError(f"tokens of dtype {self.dtype} cannot be stored; the format has {', '.join(map(str, CODES))}")
        self.prefix = pathlib.Path(prefix)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._aside = self.prefix.with_name(f".{self.prefix.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
        self._file = open(f"{self._aside}.bin", "wb", buffering=1 << 20)  # noqa: SIM115 - lives as long as the writer
        self._lengths, self._documents, self._modes = array.array("i"), array.array("q", [0]), array.array("b")

    def _fit(self, tokens) -> np.ndarray:
        """`tokens` as the file's dtype; DataError where a value does not fit (numpy would wrap it round silently)."""
        given = np.asarray(tokens)
        if given.dtype == self.dtype or not given.size:
            return np.ascontiguousarray(given, self.dtype)
        stored = given.astype(self.dtype)
        if self.dtype.kind in "iu" and not np.array_equal(stored, given):
            raise DataError(f"tokens from {given.min()} to {given.max()} do not fit {self.dtype}; choose it by the vocabulary (best_dtype)")
        return stored

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

        tokens: all tokens in a row. lengths: tokens of each sequence. sequences_per_document: default, each sequence is a document.
        """
        tokens, lengths = self._fit(tokens), np.asarray(lengths, np.int32)
        per_document = np.ones(lengths.size, np.int64) if sequences_per_document is None else np.asarray(sequences_per_document, np.int64)
        if lengths.sum(dtype=np.int64) != tokens.size or per_document.sum() != lengths.size:
            raise DataError(
                f"{tokens.size} tokens, {lengths.size} lengths that sum to {lengths.sum(dtype=np.int64)}, documents of "
                f"{per_document.sum()} sequences: the counts disagree"
            )
        self._extend(lengths, len(self._lengths) + np.cumsum(per_document), modes)
        self._file.write(tokens.data)

    def add_index(self, prefix: str | os.PathLike) -> None:
        """Append a whole dataset of the same dtype (a merge, as Megatron's)."""
        other = IndexedDataset(prefix, float_codes="core", multimodal=self.multimodal or None)
        if other.dtype != self.dtype:
            raise DataError(
                f"{other.index_path}, offset 17: dtype {other.dtype}, but {self.prefix} has {self.dtype}; only equal dtypes merge"
            )
        self._extend(other.lengths, len(self._lengths) + other.document_indices[1:], other.modes)
        self._file.flush()
        with open(other.bin_path, "rb") as source:
            shutil.copyfileobj(source, self._file, 1 << 24)

    def _extend(self, lengths: np.ndarray, documents: np.ndarray, modes) -> None:
        self._lengths.frombytes(lengths.astype(np.intc).tobytes())
        self._documents.frombytes(documents.astype(np.int64).tobytes())
        if self.multimodal:
            self._modes.frombytes((np.zeros(len(lengths), np.int8) if modes is None else np.asarray(modes, np.int8)).tobytes())

    def finish(self) -> None:
        """Write the index, sync and put both files in place. Sequences after the last `end_document` form a last document."""
        if self._documents[-1] != len(self._lengths):
            self.end_document()
        lengths = np.frombuffer(self._lengths, np.intc)
        with open(f"{self._aside}.idx", "wb") as index:
            index.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], lengths.size, len(self._documents)))
            index.write(lengths.astype("<i4", copy=False).data)
            carried = 0
            for begin in range(0, lengths.size, BLOCK):
                sizes = lengths[begin : begin + BLOCK].astype("<i8") * self.dtype.itemsize
                ends = carried + np.cumsum(sizes)
                index.write((ends - sizes).data)
                carried = int(ends[-1])
            index.write(self._documents)
            index.write(self._modes)
            index.flush()
            os.fsync(index.fileno())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        for suffix in (".bin", ".idx"):  # the index last: where it is, the data is
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
