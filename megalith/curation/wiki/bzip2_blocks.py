"""The blocks of a bzip2 file, each decompressed by itself.

bzip2 compresses blocks of up to 900 kB that know nothing of each other; each begins with a 48-bit number, at any bit.
So workers share one file, whether it is a multistream dump or a single stream, and damage costs the block that it is
in. (The format: Seward, bzip2 1.0. A block is wrapped as a stream of its own, as bzip2recover does.)
"""

from __future__ import annotations

import bz2
import dataclasses
import itertools
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

BLOCK_START, STREAM_END = 0x314159265359, 0x177245385090  # 48 bits each
WINDOW = 1 << 20  # bytes looked through at once
LARGEST = 1_200_000  # bytes of a compressed block: 900 kB that do not compress
TRIES = 3  # ends that are tried: a mark may be there by chance, once in 2^48 bits
HEADER = int.from_bytes(b"BZh9", "big")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block: the bit of the file at which it begins, and its content; None where it is damaged."""

    bit: int
    content: bytes | None


def read_blocks(file: BinaryIO, start: int) -> Iterator[Block]:
    """The blocks that begin at byte `start` or behind it, to the end of the file."""
    marks = _marks(file, start)
    ahead: list[tuple[int, bool]] = list(itertools.islice(marks, 1))
    while ahead:
        bit, is_block = ahead.pop(0)
        ahead += itertools.islice(marks, max(0, TRIES - len(ahead)))
        if not is_block:
            continue
        content = None
        for tried, (end, _) in enumerate(ahead[:TRIES]):
            if end - bit > 8 * LARGEST:
                break
            if (content := _decompress(file, bit, end)) is not None:
                del ahead[:tried]  # marks inside of the block were none
                break
        yield Block(bit, content)
        if not ahead:
            ahead += itertools.islice(marks, 1)


def _marks(file: BinaryIO, start: int) -> Iterator[tuple[int, bool]]:
    """(bit of the file, whether a block begins there; otherwise a stream ends) in order."""
    while True:
        file.seek(start)
        data = file.read(WINDOW + 7)
        if len(data) < 6:
            return
        found = [(bit, True) for bit in find_bits(data, BLOCK_START)]
        found += [(bit, False) for bit in find_bits(data, STREAM_END)]
        yield from ((8 * start + bit, is_block) for bit, is_block in sorted(found) if bit < 8 * WINDOW)
        start += WINDOW


def find_bits(data: bytes, number: int) -> list[int]:
    """The bits at which a 48-bit number begins in `data`."""
    array, pattern = np.frombuffer(data, np.uint8), number.to_bytes(6, "big")
    found = []
    for shift in range(8):
        shifted = data
        if shift:
            shifted = ((array[:-1] << np.uint8(shift)) | (array[1:] >> np.uint8(8 - shift))).tobytes()
        at = shifted.find(pattern)
        while at >= 0:
            found.append(8 * at + shift)
            at = shifted.find(pattern, at + 1)
    return found


def _decompress(file: BinaryIO, begin: int, end: int) -> bytes | None:
    """The content of the block in bits begin to end, None where it is damaged."""
    first, last = begin // 8, -(-end // 8)
    file.seek(first)
    length = end - begin
    if length < 80:
        return None
    bits = int.from_bytes(file.read(last - first), "big") >> (8 * last - end)
    block = bits & ((1 << length) - 1)
    checksum = (block >> (length - 80)) & 0xFFFFFFFF  # behind the mark; a stream of one block has the same
    stream = (((HEADER << length | block) << 48 | STREAM_END) << 32) | checksum
    size = 32 + length + 48 + 32
    padding = -size % 8
    try:
        return bz2.decompress((stream << padding).to_bytes((size + padding) // 8, "big"))
    except (OSError, ValueError):
        return None
