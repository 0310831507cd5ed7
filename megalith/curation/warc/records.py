"""The records of a WARC file (ISO 28500), plain or in gzip, in parts that are read side by side.

Crawlers compress each record by itself, as a member of the gzip file. So a worker begins at the first member behind any
byte, and damage costs the member that it is in. A file that is one member, or plain, is read from its beginning to its
end by one worker. A compressed archive inside of a record is taken for records where a range begins in it, or behind
damage; nothing in the file tells the two apart.
"""

from __future__ import annotations

import dataclasses
import http.client
import io
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from megalith.common import units
from megalith.data.corpus.compression import compression, first_bytes

MEMBER = b"\x1f\x8b\x08"  # how a member of gzip begins
RECORD = b"WARC/"  # how a record begins
BLOCK = 1 << 16  # bytes read at once
MAX_LINE = 1 << 16  # bytes of a line between records


@dataclasses.dataclass(frozen=True)
class Record:
    """A record: the byte of the file at which it (or its member) begins, its headers, its content."""

    at: int
    headers: Mapping[str, str]
    content: bytes


@dataclasses.dataclass(frozen=True)
class Damage:
    """What could not be read, and why."""

    at: int
    reason: str


def read_records(path: str, start: int, stop: int, max_bytes: int) -> Iterator[Record | Damage]:
    """The records that begin in these bytes of the file. max_bytes: a longer one is passed over, and Damage."""
    with open(path, "rb") as file:
        if compression(first_bytes(path)) != ".gz":
            yield from _records(file, None, max_bytes)
            return
        at = _next_member(file, start, stop)
        while at is not None:
            member = _Member(file, at)
            waiting: list[Record | Damage] = []  # the checksum is behind the last record, which may be a damaged one
            try:
                for found in _records(io.BufferedReader(member, BLOCK), at, max_bytes):
                    yield from waiting
                    waiting = [found]
                yield from waiting
            except (zlib.error, EOFError) as error:
                yield Damage(at, f"damaged gzip ({error})")
            at = _next_member(file, at + 1 if member.end is None else member.end, stop)


class _Member(io.RawIOBase):
    """The decompressed bytes of the member of gzip that begins at a byte. end: the byte behind it, once it is read."""

    def __init__(self, file: BinaryIO, at: int):
        """Nothing is read yet."""
        self._file, self._at, self._waiting = file, at, b""
        self._decompressor = zlib.decompressobj(31)
        self.end: int | None = None

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or some of it; 0 at the end. Raises zlib.error, EOFError where the member is damaged."""
        while self.end is None:
            if not self._waiting:
                self._file.seek(self._at)
                self._waiting = self._file.read(BLOCK)
                self._at += len(self._waiting)
                if not self._waiting:
                    raise EOFError("the file ends inside of it")
            content = self._decompressor.decompress(self._waiting, len(buffer))
            self._waiting = self._decompressor.unconsumed_tail
            if self._decompressor.eof:
                self.end = self._at - len(self._decompressor.unused_data)
            if content:
                buffer[: len(content)] = content
                return len(content)
        return 0


def _next_member(file: BinaryIO, start: int, stop: int) -> int | None:
    """The first byte from `start` on, and before `stop`, at which a member begins that holds records."""
    while start < stop:
        file.seek(start)
        block = file.read(BLOCK)
        found = block.find(MEMBER)
        while found >= 0 and start + found < stop:
            try:
                if zlib.decompressobj(31).decompress(block[found : found + 512], len(RECORD)) == RECORD:
                    return start + found
            except zlib.error:
                pass
            found = block.find(MEMBER, found + 1)
        if len(block) < BLOCK:
            return None
        start += BLOCK - 512  # so that the beginning of a member is never cut
    return None


def _records(stream: Any, start: int | None, max_bytes: int) -> Iterator[Record | Damage]:
    """The records of a stream. start: of the member that the stream is of; None for a plain file.

    Behind damage it goes on at the next line that begins as a record does.
    """
    in_order = True  # False while a record is looked for behind damage
    while line := stream.readline(MAX_LINE):
        if not line.strip() or not (line.startswith(RECORD) or in_order):
            continue
        at = stream.tell() - len(line) if start is None else start
        try:
            in_order = line.startswith(RECORD)
            if not in_order:
                raise ValueError("no record begins where the one before ends")
            headers = http.client.parse_headers(stream)
            length = int(headers.get("Content-Length", ""))
            if length < 0:
                raise ValueError(f"a Content-Length of {length}")
        except (http.client.HTTPException, ValueError) as error:
            in_order = False
            yield Damage(at, f"no WARC record ({error or type(error).__name__})")
            continue
        content = stream.read(min(length, max_bytes + 1))
        size = len(content)
        while size < length and (passed := stream.read(min(BLOCK, length - size))):
            size += len(passed)
        if size < length:
            yield Damage(at, f"a record that ends after {size:,} of its {length:,} bytes")
        elif length > max_bytes:
            yield Damage(at, f"a record longer than {units.size(max_bytes)} (--max-document-bytes)")
        else:
            yield Record(at, {name.lower(): _utf8(value) for name, value in headers.items()}, content)


def _utf8(value: str) -> str:
    """A header, which http.client takes for Latin-1."""
    return value.encode("latin-1", "replace").decode("utf-8", "replace").strip()
