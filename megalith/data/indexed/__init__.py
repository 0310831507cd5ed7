"""Megatron's indexed dataset (`prefix.bin` + `prefix.idx`, "MMIDIDX" version 1): reader and writer, byte for byte.

Layout of the .idx, little-endian, without padding; S sequences, D = documents + 1:

    0        9 bytes  magic b"MMIDIDX\\0\\0"        34           int32 x S  tokens of each sequence
    9        uint64   version, 1                  34 + 4S      int64 x S  byte offset of each sequence in the .bin
    17       uint8    dtype code                  34 + 12S     int64 x D  first sequence of each document, then S
    18       uint64   S                           34 + 12S+8D  int8  x S  modes; only in multimodal files, unannounced
    26       uint64   D

This file, format.py, reader.py and writer.py need nothing but numpy: together they can be copied out of megalith.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterable

from .format import best_dtype, is_folder, resolve_prefix
from .reader import IndexedDataset
from .writer import IndexedWriter

__all__ = ["IndexedDataset", "IndexedWriter", "best_dtype", "is_folder", "open_many", "resolve_prefix"]


def open_many(prefixes: Iterable[str | os.PathLike], threads: int = 32, **options) -> list[IndexedDataset]:
    """Open datasets in parallel; they are returned in order. `options` as IndexedDataset takes them.

    The headers are read, the data is not.
    """
    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(lambda prefix: IndexedDataset(prefix, **options), prefixes))
