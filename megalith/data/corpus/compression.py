"""What a file is by its first bytes, and compressed files as plain bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Callable
from typing import Any, BinaryIO

from megalith.common.errors import DataError, problem
from megalith.common.extras import require
from megalith.common.pointers import refuse_pointer

SUFFIXES = {".gz": ".gz", ".gzip": ".gz", ".zst": ".zst", ".zstd": ".zst", ".bz2": ".bz2", ".xz": ".xz", ".lzma": ".xz"}
COMPRESSIONS = tuple(dict.fromkeys(SUFFIXES.values()))  # as `compression` names them
STARTS = (  # what first bytes match -> compression
    (re.compile(rb"\x1f\x8b"), ".gz"),
    (
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        ".zst",
    ),  # the second: a skippable frame, with which pzstd begins
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), ".bz2"),
    (re.compile(rb"\xfd7zXZ\0|\x5d\0\0"), ".xz"),
)
FOREIGN = {  # first bytes -> what holds no lines of text, and the cure
    b"PK\x03\x04": ("a zip archive", "Unpack it: unzip"), b"PK\x05\x06": ("a zip archive", "Unpack it: unzip"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it: 7z x"), b"Rar!\x1a\x07": ("a rar archive", "Unpack it: unrar x"),
    b"\x04\x22\x4d\x18": ("compressed by lz4", "Decompress it: lz4 -d"), b"\x1f\x9d": ("compressed by compress", "Decompress it: gzip -d"),
    b"\xff\x06\0\0sNaPpY": ("compressed by snappy", "Decompress it"), b"\x89LZO\0": ("compressed by lzop", "Decompress it: lzop -d"),
    b"ARROW1\0\0": ("an Arrow file", "Write it as parquet or JSON lines"), b"Obj\x01": ("an Avro file", "Write it as JSON lines"),
    b"SQLite format 3\0": ("an SQLite database", "Write it as JSON lines"),
    b"%PDF-": ("a PDF", "Take the text out of it"), b"\x89HDF\r\n": ("an HDF5 file", "Write it as JSON lines"),
    b"MMIDIDX\0": ("the index of a dataset of tokens", "Name the text it was made from"),
}  # fmt: skip
PARQUET = b"PAR1"
TAR, TAR_AT = b"ustar", 257
HEAD = 512  # bytes that tell


def first_bytes(path: str) -> bytes:
    """The first HEAD bytes of a file as it lies on the disk; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""


def compression(head: bytes) -> str:
    """ ".gz", ".zst", ".bz2", ".xz", or "" where the first bytes are those of no compressed file that is read."""
    return next((kind for start, kind in STARTS if start.match(head)), "")


def check_readable(path: str) -> None:
    """Raise DataError for a pointer to a file, an archive and other things that hold no lines of text, compressed or not."""
    refuse_pointer(path)
    head, inside = first_bytes(path), ""
    if kind := compression(head):
        with open_plain(path) as stream:
            head, inside = read_checked(stream, HEAD, path), f" inside {kind[1:]}"
    again = compression(head) if inside else ""
    what, cure = next((known for start, known in FOREIGN.items() if head.startswith(start)), ("", ""))
    if head[TAR_AT : TAR_AT + len(TAR)] == TAR:
        what, cure = "a tar archive", "Unpack it: tar xf"
    elif inside and head.startswith(PARQUET):
        what, cure = "a parquet file", "Decompress it; parquet is compressed in itself"
    elif again:
        what, cure = f"a {again[1:]} file", "Decompress it once"
    if what:
        rule = "the input is JSON lines, parquet or plain text, also compressed by gzip, zstd, bzip2 or xz"
        raise DataError(problem("--input", path, f"it is {what}{inside} by its first bytes; {rule}", cure))


def open_plain(path: str, raw: BinaryIO | None = None) -> Any:
    """Open a file for reading bytes, decompressed by what it begins with; `raw` may be the open file."""
    kind = compression(first_bytes(path))
    library = require("zstandard", path) if kind == ".zst" else None
    raw = raw or open(path, "rb")  # noqa: SIM115 - closed with the wrapper
    if kind == ".gz":
        return gzip.GzipFile(fileobj=raw)
    decompressors: dict[str, Callable[[], Any]] = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}
    if library is not None:
        # The window is as large as the file asks for (zstd --long=31); the library's default refuses more than 128 MiB.
        decompressors[kind] = lambda: library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    return io.BufferedReader(_Streams(raw, decompressors[kind])) if kind else raw


def read_checked(stream: Any, count: int, path: str, whole_lines: bool = False) -> bytes:
    """About `count` bytes (all with -1), with `whole_lines` to the end of a line; empty at the end. DataError where it is damaged."""
    try:
        block = stream.read(count)
        return block + stream.readline() if whole_lines and block and not block.endswith(b"\n") else block
    except Exception as error:  # zlib, gzip, zstd and the operating system each raise their own
        rule = "the file must decompress to its end"
        raise DataError(problem(path, str(error), rule, "Fetch it again; it is damaged or cut off")) from error


class _Streams(io.RawIOBase):
    """Compressed streams one after another, with zeros between them at most, as plain bytes.

    The libraries' own readers take a zstd file that is cut off, and a bzip2 or xz file with damage between two streams, for one that
    ends there.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]):
        """Read `raw`; new: makes what decompresses one stream."""
        self._raw, self._new = raw, new
        self._ready = self._left = b""
        self._stream: Any = None  # before the first

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or some of it; 0 at the end."""
        while not self._ready:
            block, self._left = self._left or self._raw.read(1 << 16), b""
            within = self._stream is not None and not self._stream.eof
            if not block:
                if within:
                    raise EOFError("the file ends inside a compressed stream")
                return 0
            if not within:
                block = block.lstrip(b"\0")
                if not block:
                    continue
                self._stream = self._new()
            self._ready = self._stream.decompress(block)
            self._left = self._stream.unused_data if self._stream.eof else b""
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        """Close the file too."""
        self._raw.close()
        super().close()
