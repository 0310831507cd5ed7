"""What Retro's training reads (Borgeaud et al., 2022, arXiv 2112.04426): a database of chunks, neighbours of samples.

Both are made by `megalith retro` (retrieval/retro/). A folder WORKDIR holds

    db/database.json               what the chunks are of, see `ChunkDatabase`
    db/00003.chunks.npy            uint32 [n, 5]: dataset, document, first token, last token + 1, tokens of BERT
    db/00003.invalid.npy           uint32 [m, 5]: chunks without text, which are not in the database
    neighbors/train/neighbors.json what decides on the neighbours, see `Neighbors`; also valid/ and test/
    neighbors/train/00003.neighbors.npy   int32 or int64 [samples of the block, l, k]: numbers of chunks, or -1

A document is a sequence of the indexed dataset, as for a GPT dataset.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.common.files import sampled_digest
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.data import array_folder
from megalith.data.indexed.format import dataset_files, resolve_prefix
from megalith.data.indexed.tntidx import open_indexed
from megalith.data.samples.splits import normal_split
from megalith.data.sources import split_sources

VERSION = 1
DATABASE, NEIGHBORS = "database.json", "neighbors.json"
COLUMNS = ("dataset", "document", "start", "end", "bert_length")
SAMPLED_BLOCKS = 8  # of 4 KiB: how much of a file is read to notice that it has changed
DB_COMMAND, NEIGHBORS_COMMAND = "megalith retro db", "megalith retro neighbors"


def dataset_digest(prefix: str) -> str:
    """What distinguishes an indexed dataset from others, wherever it lies; of some of its bytes."""
    parts = [sampled_digest(file, SAMPLED_BLOCKS) for file in dataset_files([resolve_prefix(prefix)])]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def block_ranges(description: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """(dataset, first document, last document + 1) of each block of a database."""
    size = description["doc_block_size"]
    return [
        (number, first, min(first + size, dataset["documents"][1]))
        for number, dataset in enumerate(description["datasets"])
        for first in range(dataset["documents"][0], dataset["documents"][1], size)
    ]


class ChunkDatabase:
    """The chunks of all documents of a database, by number; numbers follow documents, and chunks in them."""

    def __init__(self, path: str | os.PathLike):
        """path: WORKDIR/db. Raises DataError where it is incomplete, or its datasets are gone or have changed."""
        self.path = pathlib.Path(path)
        self.description = read_database(self.path)
        self.chunk_length: int = self.description["chunk_length"]
        self.ranges = block_ranges(self.description)
        array_folder.check_complete(path, len(self.ranges), "blocks", DB_COMMAND)
        facts = [self._facts(block) for block in range(len(self.ranges))]
        self.invalid = sum(each["invalid"] for each in facts)  # chunks without text
        # of everything that the database was made of, and of what it holds
        self.digest = array_folder.digest(
            self.path / name for name in [DATABASE, *(f"{b:05d}.json" for b in range(len(facts)))]
        )
        self._blocks = [
            array_folder.open_array(path, block, "chunks", np.uint32, (each["chunks"], 5), f"{block:05d}.json")
            for block, each in enumerate(facts)
        ]
        self._starts = np.concatenate(([0], np.cumsum([len(block) for block in self._blocks]))).astype(np.int64)
        self._datasets = [self._open(dataset) for dataset in self.description["datasets"]]

    def _facts(self, block: int) -> dict[str, Any]:
        path = self.path / f"{block:05d}.json"
        facts = array_folder.read_json(path, f"Give the {DB_COMMAND} command again: it is built anew")
        if not all(isinstance(facts.get(name), int) for name in ("chunks", "invalid")):
            raise DataError(f"{path} is damaged (no number of chunks). Give the {DB_COMMAND} command again.")
        return facts

    def _open(self, dataset: Mapping[str, Any]) -> Any:
        indexed = open_indexed(dataset["prefix"])
        if dataset_digest(indexed.prefix) != dataset["digest"]:
            rule = f"must be the dataset that {self.path} points into"
            cure = f"Restore it, or build the database again in another folder ({DB_COMMAND})"
            raise DataError(problem(dataset["prefix"], Words("another one"), rule, cure))
        return indexed

    def __len__(self) -> int:
        """Chunks of the database."""
        return int(self._starts[-1])

    def rows(self, numbers: Any) -> np.ndarray:
        """int64 [n, 5] of these chunks: see COLUMNS. Raises IndexError for numbers that are not in the database."""
        numbers = np.asarray(numbers, np.int64)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"chunks {numbers.min()} to {numbers.max()} of {self.path}, which has {len(self)}")
        found = np.empty((len(numbers), len(COLUMNS)), np.int64)
        blocks = np.searchsorted(self._starts, numbers, "right") - 1
        for block in np.unique(blocks):
            here = blocks == block
            found[here] = self._blocks[block][numbers[here] - self._starts[block]]
        return found

    def chunk(self, number: int) -> np.ndarray:
        """Ids of a chunk, int64 [1 to chunk_length]."""
        dataset, document, start, end, _ = self.rows([number])[0].tolist()
        return self._datasets[dataset].get(document, start, end - start).astype(np.int64)

    def continuation(self, number: int) -> np.ndarray:
        """Ids of the chunk that follows in the same document, int64 [0 to chunk_length]; empty where none does."""
        if number + 1 < len(self):
            (dataset, document, _, end, _), following = self.rows([number, number + 1]).tolist()
            if following[:3] == [dataset, document, end]:
                return self.chunk(number + 1)
        return np.empty(0, np.int64)


def read_database(path: pathlib.Path) -> dict[str, Any]:
    """database.json of a folder. Raises DataError where there is none, or it is of another version."""
    return _read(path / DATABASE, DB_COMMAND, ("chunk_length", "doc_block_size", "datasets"))


def read_neighbors(path: pathlib.Path) -> dict[str, Any]:
    """neighbors.json of a folder. Raises DataError where there is none, or it is of another version."""
    return _read(path / NEIGHBORS, NEIGHBORS_COMMAND, ("samples", "chunks", "neighbors", "block_size", "dtype"))


class Neighbors:
    """The neighbours of the chunks of every sample of a split, numbers of chunks of the database."""

    def __init__(self, path: str | os.PathLike, fingerprint: Mapping[str, Any]):
        """path: WORKDIR/neighbors/SPLIT. fingerprint: of the samples that are read, see `samples_fingerprint`.

        Raises DataError where neighbours are missing, or were found for other samples.
        """
        self.path = pathlib.Path(path)
        self.description = read_neighbors(self.path)
        cure = f"Give the flags with which the neighbours were found, or find them again ({NEIGHBORS_COMMAND})"
        array_folder.check_same(path, self.description, fingerprint, cure)
        self.block_size: int = self.description["block_size"]
        samples, shape = self.description["samples"], (self.description["chunks"], self.description["neighbors"])
        ranges = sample_ranges(samples, self.block_size)
        array_folder.check_complete(path, len(ranges), "blocks", NEIGHBORS_COMMAND)
        dtype = np.dtype(self.description["dtype"]).type
        self._blocks = [
            array_folder.open_array(path, block, "neighbors", dtype, (len(here), *shape), NEIGHBORS)
            for block, here in enumerate(ranges)
        ]

    def __len__(self) -> int:
        """Samples."""
        return self.description["samples"]

    def of(self, sample: int) -> np.ndarray:
        """int64 [l, k]: neighbours of each chunk of a sample, the nearest first; -1 where fewer were found.

        sample: its number in the split's dataset, that of the blend where there are several sources.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {self.path}, which has the neighbours of {len(self)}")
        block, place = divmod(sample, self.block_size)
        return self._blocks[block][place].astype(np.int64)


def samples_fingerprint(config: RunConfig, split: str, samples: int, database: ChunkDatabase) -> dict[str, Any]:
    """What decides which tokens are in which sample of a split, and what numbers of chunks mean.

    samples: how many the run requests of the split. They count too, because they decide on the epochs that are shuffled
    together, and on the blend. Data are named by what they hold, not by where they lie.
    """
    data, batch = config.data, config.batch
    sources, divided = split_sources(data)
    weights = ["" if source.weight is None else f"{source.weight} " for source in sources[split]]
    found = {
        "database": database.digest,
        "chunk_length": database.chunk_length,
        "data": [f"{weight}{dataset_digest(each.prefix)}" for weight, each in zip(weights, sources[split])],
        "corpora": [source.corpus for source in sources[split]],
        "split": normal_split(data.split) if divided else "",
        "split_rounding": data.split_rounding,
        "seed": batch.seed,
        "seq_length": data.seq_length,
        "samples": samples,
        "blend_sample_in_corpus": data.blend_sample_in_corpus,
        "shuffle_sample_in_corpus": data.shuffle_sample_in_corpus,
    }
    if data.data_weights_schedule and split == "train":
        found["data_weights_schedule"] = array_folder.digest([data.data_weights_schedule])
    return found


def sample_ranges(samples: int, block_size: int) -> list[range]:
    """The samples of each block."""
    return [range(first, min(first + block_size, samples)) for first in range(0, samples, block_size)]


def _read(path: pathlib.Path, command: str, names: tuple[str, ...]) -> dict[str, Any]:
    """A description that has these names."""
    if not path.exists():
        raise DataError(problem(str(path), None, "must be there", f"Make it with {command}"))
    found = array_folder.read_json(path, f"Restore it, or give the {command} command for another folder")
    if found.get("version") != VERSION:
        rule, cure = f"must be of version {VERSION}", f"Make another folder with {command}"
        raise DataError(problem(str(path), Words(f"version {found.get('version')}"), rule, cure))
    if absent := [name for name in names if name not in found]:
        raise DataError(f"{path} is damaged: it lacks {', '.join(absent)}. Make another folder with {command}.")
    return found
