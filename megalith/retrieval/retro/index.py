"""Step 2: the vector of every chunk of the database, by a BERT, in a store that FAISS may index (retrieval/store.py).

Keys are the mean of BERT's last hidden states over the tokens of a chunk, compared by their L2 distance (Borgeaud et
al., 2022, section 2.3).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from megalith.data.retro import ChunkDatabase
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.retrieval import embed, store
from megalith.retrieval.retro.database import ChunkTexts
from megalith.retrieval.sources import pack_queries


class Chunks:
    """The chunks of a database as texts that are embedded, see retrieval/sources.py: Source."""

    columns: tuple[str, ...] = ("chunk",)

    def __init__(self, database: ChunkDatabase, gpt: Tokenizer, bert: Tokenizer, max_length: int):
        """max_length: tokens of BERT, [CLS] and [SEP] among them, that are read of a chunk."""
        self.database, self.texts, self.bert, self.max_length = database, ChunkTexts(gpt), bert, max_length

    def __len__(self) -> int:
        return len(self.database)

    def rows(self, numbers: range) -> np.ndarray:
        """See Source."""
        return np.array(numbers, np.int64)[:, None]

    def ids(self, numbers: range) -> list[list[int]]:
        """See Source."""
        texts = [self.texts(self.database.chunk(number)) for number in numbers]
        return pack_queries(self.bert, texts, self.max_length)

    def describe(self) -> dict[str, Any]:
        """See Source. It names the database by what it holds."""
        return {"kind": "retro", "database": self.database.digest, "max_length": self.max_length}

    def text(self, row: Any) -> tuple[str, str]:
        """See Source."""
        return "", self.texts(self.database.chunk(row["chunk"]))


def build_index(
    embedder: embed.TextEmbedder, chunks: Chunks, folder: str | os.PathLike, *, batch_size: int = 128,
    shard_rows: int = 65536, notice: Callable[[str], None] = lambda line: None,
) -> store.Plan:  # fmt: skip
    """Embed all chunks, those whose shards are missing or damaged; every process calls it. See embed.build."""
    return embed.build(
        embedder, chunks, folder, batch_size=batch_size, shard_rows=shard_rows, metric="l2", check=True, notice=notice
    )
