"""Neighbours of text that is being written: the database and the index of `megalith retro`, asked chunk by chunk."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.data.retro import ChunkDatabase
from megalith.data.samples.retro_dataset import MISSING, Passages
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.retrieval.embed import BertEmbedder
from megalith.retrieval.retro.database import ChunkTexts, check_vocabularies
from megalith.retrieval.retro.index import Chunks
from megalith.retrieval.retro.neighbors import Index
from megalith.retrieval.search import open_index
from megalith.retrieval.sources import pack_queries
from megalith.retrieval.store import Store, check_probe


class DatabaseRetriever:
    """A retriever (generation/retrieval/): called with the ids of a chunk it returns those of its neighbours.

    Nothing is left out: what is written is in no document of the database.
    """

    def __init__(
        self, workdir: str | os.PathLike, bert: str, model: ModelConfig, tokenizer: Tokenizer, *,
        index_string: str | None = None, device: str = "auto",
    ):  # fmt: skip
        """workdir: --retro-workdir. bert: the BERT that the index was made by. tokenizer: the GPT's.

        index_string: which index of FAISS is asked; None: every vector is compared. Raises DataError or ConfigError
        where these do not belong together.
        """
        path = pathlib.Path(workdir)
        self.embedder = BertEmbedder.load(bert, RunConfig().replace(device=device).parallel)
        database, store = ChunkDatabase(path / "db"), Store(path / "index")
        check_vocabularies(database, tokenizer, self.embedder.tokenizer)
        self.max_length = store.plan.source["max_length"]
        chunks = Chunks(database, tokenizer, self.embedder.tokenizer, self.max_length)
        store.check_source(chunks.describe())
        check_probe(store, self.embedder.probe(), bert)
        self.index: Index
        self.index = open_index(store, index_string)
        self.texts, self.passages = ChunkTexts(tokenizer), Passages(database, model, pad=0)
        self.count = model.retro_num_neighbors

    def __call__(self, chunk: Sequence[int]) -> list[list[int]]:
        """The nearest first; none for a chunk without text."""
        (ids,) = pack_queries(self.embedder.tokenizer, [self.texts(np.array(chunk))], self.max_length)
        vectors = self.embedder.embed([ids]) if len(ids) > 2 else None  # else [CLS] and [SEP] alone
        if vectors is None:
            return []
        numbers = self.index.search(vectors, self.count)[1][0].tolist()
        return [self.passages.text(number).tolist() for number in numbers if number != MISSING]
