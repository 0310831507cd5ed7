"""Samples of Retro: those of a GPT, and the texts of the neighbours that were found for each of their chunks."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.data.retro import ChunkDatabase, Neighbors, samples_fingerprint
from megalith.data.samples import gpt_dataset
from megalith.data.samples.dataset_factory import DatasetFactory

MISSING = -1  # in place of the number of a chunk, where fewer neighbours were found


class Passages:
    """The texts of chunks of a database, each with what follows it in its document."""

    def __init__(self, database: Any, model: ModelConfig, pad: int):
        """database: a ChunkDatabase, or None where all neighbours are missing. pad: id that fills texts up."""
        self.database, self.chunks = database, model.retro_num_retrieved_chunks
        self.length, self.pad = model.retrieved_length, pad
        if database is not None and database.chunk_length != model.retro_gpt_chunk_length:
            rule = f"must be {database.chunk_length}, that of the database"
            cure = f"Write --retro-gpt-chunk-length {database.chunk_length}, or build another database"
            raise DataError(problem("--retro-gpt-chunk-length", model.retro_gpt_chunk_length, rule, cure))

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """numbers: int [..., k] of chunks, or MISSING -> neighbor_tokens and neighbor_mask, int64 [..., k, r]."""
        tokens = np.full((numbers.size, self.length), self.pad, np.int64)
        mask = np.zeros_like(tokens)
        for row, number in enumerate(numbers.ravel().tolist()):
            if number != MISSING:
                text = self.text(number)
                tokens[row, : len(text)], mask[row, : len(text)] = text, 1
        shape = (*numbers.shape, self.length)
        return {"neighbor_tokens": tokens.reshape(shape), "neighbor_mask": mask.reshape(shape)}

    def text(self, number: int) -> np.ndarray:
        """Ids of a chunk and of those that follow it in its document, whose numbers follow on its own."""
        parts = [self.database.chunk(number)]
        while len(parts) < self.chunks and len(following := self.database.continuation(number)):
            parts.append(following)
            number += 1
        return np.concatenate(parts)


class RetroDataset:
    """Samples of a GPT dataset with neighbor_tokens and neighbor_mask [l, k, r] int64.

    They are the k neighbours of each of the sample's l chunks; the mask is 1 for tokens, 0 for padding and for a
    neighbour that is missing.
    """

    def __init__(self, dataset: Any, neighbors: Any, passages: Passages, model: ModelConfig, seq_length: int):
        """neighbors: a Neighbors, or None: all are missing. Raises DataError where it has too few for a chunk."""
        self.dataset, self.neighbors, self.passages = dataset, neighbors, passages
        self.shape = (seq_length // model.retro_gpt_chunk_length, model.retro_num_neighbors)
        self.source_usage = getattr(dataset, "source_usage", ())
        found = self.shape if neighbors is None or not len(neighbors) else neighbors.of(0).shape
        if found[0] != self.shape[0] or found[1] < self.shape[1]:
            rule = f"must be at most {found[1]} for {found[0]} chunks of a sample, as {neighbors.path} has them"
            cure = "Write fewer, or find more of them (megalith retro neighbors)"
            what = f"--retro-num-neighbors, for {self.shape[0]} chunks of a sample,"
            raise DataError(problem(what, self.shape[1], rule, cure))

    def __len__(self) -> int:
        """Samples whose neighbours are known."""
        return len(self.dataset) if self.neighbors is None else min(len(self.dataset), len(self.neighbors))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`, as the class describes."""
        numbers = np.full(self.shape, MISSING) if self.neighbors is None else self.neighbors.of(index)
        return self.dataset[index] | self.passages.read(numbers[:, : self.shape[1]])


def with_neighbors(
    config: RunConfig, tokenizer: Any, datasets: dict[str, Any], requested: dict[str, int]
) -> dict[str, Any]:  # fmt: skip
    """The datasets of all splits, with the neighbours that --retro-workdir has for them.

    requested: samples that the run requests of each split. With --retro-no-retrieval every neighbour is missing.
    """
    data, model, folder = config.data, config.model, pathlib.Path(config.data.retro_workdir or "")
    database = None if data.retro_no_retrieval else ChunkDatabase(folder / "db")
    passages = Passages(database, model, tokenizer.require("eod"))

    def add(split: str, dataset: Any) -> RetroDataset:
        neighbors = None
        if database is not None:
            fingerprint = samples_fingerprint(config, split, requested[split], database)
            neighbors = Neighbors(folder / "neighbors" / split, fingerprint)
        return RetroDataset(dataset, neighbors, passages, model, data.seq_length or 0)

    return {split: None if dataset is None else add(split, dataset) for split, dataset in datasets.items()}


from_config = DatasetFactory(gpt_dataset.GPTDataset, gpt_dataset.options, finish=with_neighbors)
