"""Megatron's own directories (`mp_rank_00/model_optim_rng.pt`) of every version, in any layout, and the zips of its releases."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from megalith.checkpoint.formats import Format, Options
from megalith.checkpoint.formats.megatron import build, optimizer
from megalith.checkpoint.formats.megatron.agreement import same_iteration
from megalith.checkpoint.formats.megatron.assemble import by_rank
from megalith.checkpoint.formats.megatron.replicas import Replicas
from megalith.checkpoint.formats.megatron.source import (
    EXPERT,
    RANK,
    Files,
    Rank,
    chunks_of,
    find,
    is_core,
    is_release,
    number_layers,
    read_ranks,
)
from megalith.checkpoint.formats.megatron.write import write
from megalith.checkpoint.tensors.unpickle import load_file
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError


def recognises(path: pathlib.Path) -> bool:
    """Whether `path` is such a directory, a release as downloaded, or one file of torch.save."""
    if path.is_dir():
        return any(RANK.search(name) or EXPERT.search(name) for name in Files.of(path).names)
    return path.suffix in (".pt", ".pth", ".zip") and (is_release(path) or path.suffix != ".zip")


def read(path: pathlib.Path, options: Options) -> Weights:
    """The weights at `path`. Raises CheckpointError for what is missing, damaged, unknown or does not fit."""
    classes: set[str] = set()
    notes: list[str] = []
    if path.is_file() and not is_release(path):
        content, found = load_file(path)
        content = content if isinstance(content, dict) else {}
        classes.update(found)
        ranks = [Rank(str(path), 0, 0, content, chunks_of(content))]
        number_layers(ranks)
    else:
        files = Files.of(path)
        folder = find(files, options.iteration)
        ranks = read_ranks(files, folder, classes)
        notes += same_iteration((files.path / folder).name, ranks[0].content)
    return weights_of(ranks, classes, options, notes)


def weights_of(ranks: list[Rank], classes: set[str], options: Options, notes: Sequence[str] = ()) -> Weights:
    """The weights of these ranks, with the optimizer's state if asked for. notes: those that reading the ranks gave."""
    content, replicas = ranks[0].content, Replicas(options.replicas, {rank.name: rank.content for rank in ranks})
    holders = [
        (rank, f"{rank.name}" + f", model{n}" * (len(rank.chunks) > 1), chunk)
        for rank in ranks
        for n, chunk in enumerate(rank.chunks)
    ]
    parts = by_rank(((rank.tensor, where, chunk) for rank, where, chunk in holders), replicas)
    if not parts or not parts[0]:
        raise CheckpointError(
            f"{ranks[0].name}: no tensors found; a file of Megatron holds them under `model` or `module`. Check the path."
        )
    version = 3.0 if is_core(content) else build.version_of(content, 0.0)
    return build.weights_of(
        content, version, parts, lambda more: optimizer.read(ranks, more, replicas), classes, options, replicas, notes
    )


FORMAT = Format(
    "megatron: mp_rank_00/model_optim_rng.pt in a folder, in iter_NNNNNNN/ or release/ of it, or in a zip; or one .pt file",
    recognises,
    read,
    write,
)
