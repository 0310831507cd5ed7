"""What a file is by its first bytes, and reading compressed files as decompressed bytes."""

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
from megalith.config.flags.text import Words

SUFFIXES = {".gz": ".gz", ".gzip": ".gz", ".zst": ".zst", ".zstd": ".zst", ".bz2": ".bz2", ".xz": ".xz", ".lzma": ".xz"}
COMPRESSIONS = tuple(dict.fromkeys(SUFFIXES.values()))  # as `compression` names them
SIGNATURES = (  # (pattern of the first bytes, compression)
    (re.compile(rb"\x1f\x8b"), ".gz"),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), ".zst"),  # after |: a skippable frame, pzstd's first
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), ".bz2"),
    (re.compile(rb"\xfd7zXZ\0|\x5d\0\0"), ".xz"),
)
NOT_TEXT = {  # first bytes -> (a file that holds no lines of text, the cure)
    b"PK\x03\x04": ("a zip archive", "Unpack it: unzip"),
    b"PK\x05\x06": ("a zip archive", "Unpack it: unzip"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it: 7z x"),
    b"Rar!\x1a\x07": ("a rar archive", "Unpack it: unrar x"),
    b"\x04\x22\x4d\x18": ("compressed by lz4", "Decompress it: lz4 -d"),
    b"\x1f\x9d": ("compressed by compress", "Decompress it: gzip -d"),
    b"\xff\x06\0\0sNaPpY": ("compressed by snappy", "Decompress it"),
    b"\x89LZO\0": ("compressed by lzop", "Decompress it: lzop -d"),
    b"ARROW1\0\0": ("an Arrow file", "Write it as parquet or JSON lines"),
    b"Obj\x01": ("an Avro file", "Write it as JSON lines"),
    b"SQLite format 3\0": ("an SQLite database", "Write it as JSON lines"),
    b"%PDF-": ("a PDF", "Take the text out of it"),
    b"\x89HDF\r\n": ("an HDF5 file", "Write it as JSON lines"),
    b"MMIDIDX\0": ("the index of a dataset of tokens", "Name the text it was made from"),
}
PARQUET_SIGNATURE = b"PAR1"
TAR_SIGNATURE, TAR_OFFSET = b"ustar", 257
SKIPPED_BYTES = 1 << 20  # of a line that is too long, at once
COMPRESSED_BYTES, DECOMPRESSED = 1 << 16, 1 << 18  # read, and asked of a decompressor, at once
ZSTD_BYTES = 1 << 10  # given to zstandard at once: a block of 128 KiB may be 4 bytes, so that 64 KiB could hold 2 GiB
HEAD_BYTES = 512  # enough to recognize every format above


def first_bytes(path: str) -> bytes:
    """The first HEAD_BYTES of a file as it lies on the disk; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def compression(head: bytes) -> str:
    """The compression (".gz", ".zst", ".bz2", ".xz") that a file with these first bytes has, "" for none of them."""
    return next((kind for start, kind in SIGNATURES if start.match(head)), "")


def check_readable(path: str) -> None:
    """Raise DataError for a git LFS pointer, an archive or another file without lines of text, compressed or not."""
    refuse_pointer(path)
    head, inside = first_bytes(path), ""
    if kind := compression(head):
        with open_decompressed(path) as stream:
            head, inside = read_checked(stream, HEAD_BYTES, path), f" inside {kind[1:]}"
    again = compression(head) if inside else ""
    what, cure = next((entry for start, entry in NOT_TEXT.items() if head.startswith(start)), ("", ""))
    if head[TAR_OFFSET : TAR_OFFSET + len(TAR_SIGNATURE)] == TAR_SIGNATURE:
        what, cure = "a tar archive", "Unpack it: tar xf"
    elif inside and head.startswith(PARQUET_SIGNATURE):
        what, cure = "a parquet file", "Decompress it; parquet is compressed in itself"
    elif again:
        what, cure = f"a {again[1:]} file", "Decompress it once"
    if what:
        rule = "must be JSON lines, parquet or plain text, also compressed by gzip, zstd, bzip2 or xz"
        found = Words(f"{path}, which is {what}{inside} by its first bytes")
        raise DataError(problem("--input", found, rule, cure))


def open_decompressed(path: str, raw: BinaryIO | None = None) -> Any:
    """Open a file for reading bytes, decompressed by what its first bytes say; `raw` may be the open file."""
    kind = compression(first_bytes(path))
    library = require("zstandard", path) if kind == ".zst" else None
    raw = raw or open(path, "rb")  # noqa: SIM115 - closed with the wrapper
    if kind == ".gz":
        return gzip.GzipFile(fileobj=raw)
    decompressors: dict[str, Callable[[], Any]] = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}
    if library is not None:
        # The window is as large as the file asks for (zstd --long=31); the library's default refuses more than 128 MiB.
        decompressors[kind] = lambda: library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    return io.BufferedReader(_ConcatenatedStreams(raw, decompressors[kind])) if kind else raw


def read_checked(stream: Any, count: int, path: str, method: str = "read") -> bytes:
    """About `count` bytes (all with -1), empty at the end. method: `read`, or `readline` for a line's bytes.

    Raises DataError where the file is damaged.
    """
    try:
        return getattr(stream, method)(count)
    except Exception as error:  # zlib, gzip, zstd and the operating system each raise their own
        found = Words(f"the error {str(error)!r}")
        cure = "Fetch it again; it is damaged or cut off"
        raise DataError(problem(path, found, "must decompress to its end", cure)) from error


def read_lines(stream: Any, count: int, path: str, max_line: int | None = None) -> tuple[bytes, int]:
    """About `count` bytes and what their last line still has, and how many bytes were consumed; b"" at the end.

    max_line: a last line of more bytes is cut after max_line + 1 of them, and the rest is passed over, so that a line
    (a zip bomb, a file of another kind) takes no more memory than that. Who reads the lines finds it by its length.
    Raises DataError where the file is damaged.
    """
    block = read_checked(stream, count, path)
    if not block or block.endswith(b"\n"):
        return block, len(block)
    if max_line is None:
        block += read_checked(stream, -1, path, "readline")
        return block, len(block)
    room = max(0, max_line + 1 - (len(block) - block.rfind(b"\n") - 1))
    rest = read_checked(stream, room, path, "readline")
    block, size, last = block + rest, len(block) + len(rest), rest
    while not last.endswith(b"\n") and (last := read_checked(stream, SKIPPED_BYTES, path, "readline")):
        size += len(last)
    return block if block.endswith(b"\n") else block + b"\n", size


def skip_line(stream: Any, limit: float, path: str) -> int | None:
    """Pass over the rest of a line; returns its bytes, None where it has no end within `limit` bytes."""
    size = 0
    while size < limit and (piece := read_checked(stream, int(min(SKIPPED_BYTES, limit - size)), path, "readline")):
        size += len(piece)
        if piece.endswith(b"\n"):
            return size
    return None


class _ConcatenatedStreams(io.RawIOBase):
    """The decompressed bytes of compressed streams one after another, with at most zeros between them.

    The libraries' readers take a zstd file that is cut off, and a bzip2 or xz file with damage between two streams,
    for one that ends there.
    """

    def __init__(self, raw: BinaryIO, new_decompressor: Callable[[], Any]):
        """Read `raw`; new_decompressor: makes the decompressor of one stream."""
        self._raw, self._new_decompressor = raw, new_decompressor
        # bz2 and lzma give as much at once as they are asked for; zstandard gives all that its input holds.
        self._limits = isinstance(new_decompressor(), (bz2.BZ2Decompressor, lzma.LZMADecompressor))
        self._piece = COMPRESSED_BYTES if self._limits else ZSTD_BYTES
        self._decompressed = self._unread = b""
        self._given = 0  # bytes of `_decompressed` that are read; to cut them off would copy the rest each time
        self._decompressor: Any = None  # none before the first stream

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or some of it; 0 at the end."""
        while self._given == len(self._decompressed):
            in_stream = self._decompressor is not None and not self._decompressor.eof
            if in_stream and self._limits and not self._decompressor.needs_input:
                self._decompress(b"")
                continue
            held, self._unread = self._unread or self._raw.read(COMPRESSED_BYTES), b""
            block, self._unread = held[: self._piece], held[self._piece :]
            if not block:
                if in_stream:
                    raise EOFError("the file ends inside a compressed stream")
                return 0
            if not in_stream:
                block = block.lstrip(b"\0")
                if not block:
                    continue
                self._decompressor = self._new_decompressor()
            self._decompress(block)
        count = min(len(buffer), len(self._decompressed) - self._given)
        buffer[:count] = memoryview(self._decompressed)[self._given : self._given + count]
        self._given += count
        return count

    def _decompress(self, block: bytes) -> None:
        decompressor, self._given = self._decompressor, 0
        self._decompressed = (
            decompressor.decompress(block, DECOMPRESSED) if self._limits else decompressor.decompress(block)
        )
        if decompressor.eof:
            self._unread = decompressor.unused_data + self._unread

    def close(self) -> None:
        """Close the file too."""
        self._raw.close()
        super().close()
