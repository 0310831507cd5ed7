"""Checkpoints of megalith as one of the formats; a checkpoint of adapters is read together with its base."""

from __future__ import annotations

import pathlib

from megalith.checkpoint import weights as own_format
from megalith.checkpoint.formats import Format, MegalithOptions
from megalith.checkpoint.formats.adapters import with_base
from megalith.checkpoint.store.folder import is_megalith
from megalith.checkpoint.store.manifest import NAME as MANIFEST
from megalith.checkpoint.weights import Weights


def read(path: pathlib.Path, options: MegalithOptions) -> Weights:
    """The weights of a checkpoint; of a run with --lora-rank those of its base too."""
    found = own_format.read_megalith(path, options.iteration)
    return with_base(found) if found.config.lora.lora_rank else found


def write(weights: Weights, folder: pathlib.Path, options: MegalithOptions) -> None:
    """Write a checkpoint."""
    own_format.write(weights, folder)


FORMAT = Format(
    f"megalith: a folder with {MANIFEST}, or one of iter_NNNNNNN folders that have it",
    is_megalith,
    MegalithOptions,
    read,
    write,
)
