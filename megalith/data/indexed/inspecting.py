"""What an indexed dataset holds, and whether it is undamaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from megalith.common.errors import DataError
from megalith.common.files import sha256
from megalith.data.indexed import is_folder
from megalith.data.indexed.tntidx import TntidxDataset, open_indexed
from megalith.data.tokenizers.tokenizer import Tokenizer

BLOCK = 1 << 24  # tokens read at once


def describe(prefix: str) -> dict[str, Any]:
    """Metadata of a dataset, from its header and index.

    The names are those of Argonne's get_meta_data.py where it has one.
    """
    data = open_indexed(prefix)
    lengths = data.lengths
    return {
        "data_prefix": data.prefix,
        "format": "lazy/cached (TNTIDX)" if isinstance(data, TntidxDataset) else "mmap (MMIDIDX)",
        "dtype": data.dtype.name,
        "num_sequences": len(data),
        "num_documents": data.num_documents,
        "total_num_tokens": data.num_tokens,
        "size": data.bin_bytes,
        "multimodal": bool(getattr(data, "multimodal", False)),
        "shortest_sequence": int(lengths.min()) if len(data) else 0,
        "longest_sequence": int(lengths.max()) if len(data) else 0,
        "empty_documents": int((np.diff(data.document_indices) == 0).sum()),
    }


def verify(prefix: str, vocab_size: int | None = None) -> dict[str, Any]:
    """Check every entry of the index and every token; returns the largest token and both checksums.

    Raises DataError for what is damaged, and where a token is not below `vocab_size`, naming its sequence.
    """
    data = open_indexed(prefix)
    largest, smallest = -1, 0
    data.lengths  # noqa: B018 - checks the whole index
    for begin, block in _token_blocks(data):
        largest, smallest = max(largest, int(block.max())), min(smallest, int(block.min()))
        if smallest < 0 or (vocab_size is not None and largest >= vocab_size):
            wrong = begin + int(np.flatnonzero((block < 0) | (block >= (vocab_size or np.inf)))[0])
            sequence = int(np.searchsorted(np.cumsum(data.lengths, dtype=np.int64), wrong, side="right"))
            found = f"token {block[wrong - begin]} in sequence {sequence} is not of a vocabulary of {vocab_size} tokens"
            cause = "the data was made with another tokenizer. Name that one, or preprocess again."
            raise DataError(f"{data.prefix}.bin: {found}; {cause}")
    sums = {f"sha256{suffix}": sha256(data.prefix + suffix) for suffix in (".bin", ".idx")}
    return {"largest_token": largest, **sums}


def _token_blocks(data: Any) -> Iterator[tuple[int, np.ndarray]]:
    with open(data.prefix + ".bin", "rb") as file:
        begin = 0
        while (block := np.fromfile(file, data.dtype, BLOCK)).size:
            yield begin, block
            begin += block.size


def document_text(prefix: str, number: int, tokenizer: Tokenizer | None = None, limit: int = 2000) -> str:
    """The first `limit` tokens of document `number` (negative: from the end), a line for each sequence.

    They are shown as text, without a tokenizer as ids.
    """
    data = open_indexed(prefix)
    if not -data.num_documents <= number < data.num_documents:
        raise DataError(f"{data.prefix} has documents 0 to {data.num_documents - 1}; there is no document {number}")
    number %= data.num_documents
    begin, end = (int(data.document_indices[index]) for index in (number, number + 1))
    lines = []
    for sequence in range(begin, end):
        ids = data[sequence][:limit]
        limit -= len(ids)
        lines.append(tokenizer.decode(ids.tolist()) if tokenizer else " ".join(map(str, ids)))
        if limit <= 0:
            lines.append("...")
            break
    return "\n".join(lines)


def prefixes_below(path: str) -> list[str]:
    """Prefixes of all datasets in a directory and below, sorted; a prefix stands for itself (see `is_folder`)."""
    if not is_folder(path):
        return [path]
    found = []
    for folder, _, names in os.walk(path):
        indices = [name for name in names if name.endswith(".idx") and not name.startswith(".")]
        found += [os.path.join(folder, name.removesuffix(".idx")) for name in indices]
    if not found:
        raise DataError(f"{path} holds no .idx file; name a prefix, or the directory that preprocess wrote to")
    return sorted(found)
