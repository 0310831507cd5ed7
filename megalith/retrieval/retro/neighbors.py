"""Step 3: the nearest chunks of the database for each chunk of every training, validation and test sample.

A sample of s tokens has l = s / chunk length chunks. Each is embedded as the database's chunks are, and the index is
asked for more neighbours than are wanted: those of the documents that the sample is made of are left out (Borgeaud et
al., 2022, section 2.2), and the nearest of the others are kept. Blocks of samples are written by any number of
processes; a block's batches lie within it, so that all write the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import ConfigError, problem
from megalith.common.files import remove_leftovers_in
from megalith.common.locks import locked
from megalith.data import array_folder
from megalith.data.retro import NEIGHBORS, VERSION, ChunkDatabase, dataset_digest, sample_ranges
from megalith.data.samples.blended import source_of
from megalith.retrieval.embed import TextEmbedder
from megalith.retrieval.progress import Progress
from megalith.retrieval.retro.database import ChunkTexts
from megalith.retrieval.sources import pack_queries

ARRAYS = ("neighbors",)
CURE = "Give the same data, model and flags, or move this folder away first"


class Index(Protocol):
    """What answers queries: an ExactIndex or a FaissIndex, see retrieval/search.py."""

    def search(self, queries: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries [n, p] -> (scores, numbers of chunks or -1), each [n, k], the best first."""


@dataclasses.dataclass(frozen=True)
class Query:
    """How neighbours are found.

    num_query: chunks that the index is asked for. num_target: neighbours that are kept. block_chunks: chunks of samples
    in a file. max_length: tokens of BERT that are read of a chunk.
    """

    num_query: int = 200
    num_target: int = 20
    batch_size: int = 128
    block_chunks: int = 100_000
    max_length: int = 256

    def check(self) -> None:
        """Raise ConfigError where more neighbours are to be kept than found."""
        if self.num_target > self.num_query:
            rule = f"must be at most --retro-num-neighbors-query, {self.num_query}"
            raise ConfigError(problem("--retro-num-neighbors-target", self.num_target, rule, "Write a smaller number"))


class SampleChunks:
    """The chunks of the samples of a dataset as texts, and the documents that a sample is made of."""

    def __init__(self, dataset: Any, database: ChunkDatabase, texts: ChunkTexts):
        """dataset: of GPT samples, or a blend of such. Raises ConfigError where samples are no whole chunks."""
        self.dataset, self.database, self.texts = dataset, database, texts
        source, _ = source_of(dataset, 0)
        if source.seq_length % database.chunk_length:
            rule = f"must be a multiple of the chunks' length, {database.chunk_length}"
            raise ConfigError(problem("--seq-length", source.seq_length, rule, f"Write {8 * database.chunk_length}"))
        self.chunks = source.seq_length // database.chunk_length
        self.numbers = {each["digest"]: number for number, each in enumerate(database.description["datasets"])}
        self._of_prefix: dict[str, int] = {}

    def __call__(self, sample: int) -> list[str]:
        """The texts of a sample's chunks."""
        source, number = source_of(self.dataset, sample)
        return [self.texts(part) for part in np.split(source.tokens(number)[:-1], self.chunks)]

    def documents(self, sample: int) -> np.ndarray:
        """Keys (see `document_keys`) of the documents that a sample has tokens of, its last label among them."""
        source, number = source_of(self.dataset, sample)
        prefix = source.indexed.prefix
        if prefix not in self._of_prefix:
            self._of_prefix[prefix] = self.numbers.get(dataset_digest(prefix), -1)
        documents = np.array(source.locate(number)[0], np.int64)
        return document_keys(np.full_like(documents, self._of_prefix[prefix]), documents)


def document_keys(datasets: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """One number for each pair of dataset and document, int64."""
    return datasets.astype(np.int64) * 2**32 + documents


def find_neighbors(
    embedder: TextEmbedder, index: Index, samples: SampleChunks, folder: str | os.PathLike,
    fingerprint: Mapping[str, Any], query: Query, *, notice: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Write the neighbours of all samples, or those that are missing or damaged. Every process calls it.

    fingerprint: what decides on the samples (data/retro.py: samples_fingerprint) and on the index. Returns the
    description that is written. Memory: the vectors of a block's chunks and what the index needs.
    """
    folder, mesh, ranks = pathlib.Path(folder), embedder.runtime.mesh, Ranks()
    total, chunks = fingerprint["samples"], samples.chunks
    ranges = sample_ranges(total, block_size := max(1, query.block_chunks // chunks))
    description = {
        "version": VERSION, **fingerprint, "chunks": chunks, "neighbors": query.num_target, "block_size": block_size,
        "dtype": "int32" if len(samples.database) < 2**31 else "int64",
        "query": dataclasses.asdict(query),
    }  # fmt: skip
    with contextlib.ExitStack() as held:
        lock = locked(folder, inside=True, notice=notice) if mesh.is_main_process else None
        ranks.on_rank_0(lambda: held.enter_context(lock) and None)
        todo = ranks.on_rank_0(lambda: _begin(folder, description, len(ranges), notice))
        if len(todo) < len(ranges) and mesh.is_main_process:
            notice(f"{folder}: {len(ranges) - len(todo)} of {len(ranges)} blocks are there")
        progress = Progress(sum(len(ranges[block]) for block in todo), mesh.is_main_process, "samples")

        def write() -> None:
            for block in todo[mesh.data_rank :: mesh.data_size]:
                found = block_neighbors(embedder, index, samples, ranges[block], query, progress)
                if found is not None:
                    array_folder.write_part(folder, block, {"neighbors": found.astype(description["dtype"])})

        ranks.on_every_rank(write)
    return description


def _begin(
    folder: pathlib.Path, description: Mapping[str, Any], blocks: int, notice: Callable[[str], None]
) -> list[int]:  # fmt: skip
    todo = array_folder.begin(folder / NEIGHBORS, description, blocks, ARRAYS, CURE, notice)
    remove_leftovers_in(folder, notice)
    return todo


def block_neighbors(
    embedder: TextEmbedder, index: Index, samples: SampleChunks, numbers: range, query: Query, progress: Progress
) -> np.ndarray | None:  # fmt: skip
    """int64 [n, l, num_target] of these samples; None on processes that have no vectors, or have others' too."""
    writes = embedder.runtime.has_last_stage and embedder.runtime.mesh.rank("tp") == 0
    found = np.full((len(numbers), samples.chunks, query.num_target), -1, np.int64)
    step = max(1, query.batch_size // samples.chunks)  # samples of a batch
    for first in range(0, len(numbers), step):
        here = numbers[first : first + step]
        ids = pack_queries(embedder.tokenizer, [text for each in here for text in samples(each)], query.max_length)
        with_text = [number for number, row in enumerate(ids) if len(row) > 2]  # others have [CLS] and [SEP] alone
        vectors = embedder.embed([ids[number] for number in with_text]) if with_text else None
        if writes and vectors is not None:
            rows = np.full((len(ids), min(query.num_query, len(samples.database))), -1, np.int64)
            rows[with_text] = index.search(vectors, query.num_query)[1]
            for place, (sample, nearest) in enumerate(zip(here, rows.reshape(len(here), samples.chunks, -1)), first):
                kept = without_own(nearest, samples.documents(sample), samples.database)[:, : query.num_target]
                found[place, :, : kept.shape[1]] = kept
        progress.add(len(here) * embedder.runtime.mesh.data_size)
    return found if writes else None


def without_own(nearest: np.ndarray, documents: np.ndarray, database: ChunkDatabase) -> np.ndarray:
    """Neighbours [l, n] without those of these documents (keys); the others keep their order, and -1 fills up."""
    rows = database.rows(np.maximum(nearest, 0).reshape(-1))
    own = np.isin(document_keys(rows[:, 0], rows[:, 1]).reshape(nearest.shape), documents)
    dropped = own | (nearest < 0)
    order = np.argsort(dropped, axis=1, kind="stable")
    return np.where(np.take_along_axis(dropped, order, 1), -1, np.take_along_axis(nearest, order, 1))
