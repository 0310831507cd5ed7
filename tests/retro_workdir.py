"""A --retro-workdir whose neighbours are those of a function instead of a BERT's, and a run that reads it."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from megalith.config.run import RunConfig
from megalith.data import array_folder
from megalith.data.build import build_datasets, sample_counts
from megalith.data.retro import NEIGHBORS, VERSION, ChunkDatabase, samples_fingerprint
from megalith.data.tokenizers.tokenizer import tokenizer_from_config
from megalith.retrieval.retro.database import build_database, describe
from tests.tiny import tiny_config

CHUNK, FOUND = 4, 3  # tokens of a chunk, neighbours that are in the files


def tiny_retro(prefix: str, folder: str, **changes) -> RunConfig:
    """The run of `tiny_config` with a Retro."""
    values = dict(model_type="retro", dataset="retro", retro_layer_numbers=[1, 2], retro_gpt_chunk_length=CHUNK)
    return tiny_config(prefix, folder, **(values | changes))


def write_workdir(folder: str, config: RunConfig, find: Callable[[ChunkDatabase, int], np.ndarray]) -> str:
    """The database of a run's data, and neighbours of all its samples, in one block of each split.

    find: (database, sample) -> numbers of chunks [l, FOUND].
    """
    path, tokenizer = pathlib.Path(folder), tokenizer_from_config(config.data, vocab_size=config.model.vocab_size)
    length = config.model.retro_gpt_chunk_length
    description = describe(config.data, tokenizer, tokenizer, chunk_length=length, doc_block_size=50)
    database = build_database(path / "db", description, tokenizer, tokenizer)
    datasets: dict[str, Any] = build_datasets(config.replace(dataset="gpt"), tokenizer)
    for (split, dataset), samples in zip(datasets.items(), sample_counts(config)):
        if dataset is None:
            continue
        here, chunks = path / "neighbors" / split, (config.data.seq_length or 0) // length
        fingerprint = samples_fingerprint(config, split, samples, database)
        shape = {"chunks": chunks, "neighbors": FOUND, "block_size": samples, "dtype": "int32"}
        array_folder.write_description(here / NEIGHBORS, {"version": VERSION, **fingerprint, **shape}, "-")
        found = np.stack([find(database, sample) for sample in range(samples)])
        array_folder.write_part(here, 0, {"neighbors": found.astype(np.int32)})
    return folder


def drawn(database: ChunkDatabase, sample: int) -> np.ndarray:
    """Neighbours at random, of which some are missing."""
    random = np.random.RandomState(sample)
    found = random.randint(0, len(database), (4, FOUND))
    found[random.rand(4, FOUND) < 0.3] = -1
    return found
