"""Data loaders: torch's and indexed datasets', for the processes of a parallel layout."""

from megalith.integrations.accelerate.batches import IndexedBatch
from megalith.integrations.accelerate.data.indexed import MegatronLMDummyDataLoader, indexed_loaders
from megalith.integrations.accelerate.data.loader import MegatronDataLoader, skip_first_batches
from megalith.integrations.accelerate.data.prepare import micro_batch_size_of, prepare_loader

__all__ = [
    "IndexedBatch",
    "MegatronDataLoader",
    "MegatronLMDummyDataLoader",
    "indexed_loaders",
    "micro_batch_size_of",
    "prepare_loader",
    "skip_first_batches",
]
