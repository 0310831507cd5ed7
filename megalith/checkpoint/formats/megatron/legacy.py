"""Megatron's directories (`mp_rank_00/model_optim_rng.pt`) of every version and layout, and zips of its releases."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from megalith.checkpoint.formats import Format, MegatronOptions
from megalith.checkpoint.formats.megatron import build, optimizer
from megalith.checkpoint.formats.megatron.agreement import iteration_notes
from megalith.checkpoint.formats.megatron.assemble import group_by_rank
from megalith.checkpoint.formats.megatron.replicas import Replicas
from megalith.checkpoint.formats.megatron.source import (
    EXPERT_FILE,
    RANK_FILE,
    CheckpointFiles,
    RankFile,
    find,
    is_megatron_core,
    is_release,
    model_chunks,
    read_ranks,
    renumber_layers,
)
from megalith.checkpoint.formats.megatron.write import write
from megalith.checkpoint.tensors.unpickle import load_file
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError


def recognises(path: pathlib.Path) -> bool:
    """Whether `path` is such a directory, a release as downloaded, or one file of torch.save."""
    if path.is_dir():
        return any(RANK_FILE.search(name) or EXPERT_FILE.search(name) for name in CheckpointFiles.of(path).names)
    return path.suffix in (".pt", ".pth", ".zip") and (is_release(path) or path.suffix != ".zip")


def read(path: pathlib.Path, options: MegatronOptions) -> Weights:
    """The weights at `path`. Raises CheckpointError for what is missing, damaged, unknown or does not fit."""
    classes: set[str] = set()
    notes: list[str] = []
    if path.is_file() and not is_release(path):
        content, found = load_file(path)
        content = content if isinstance(content, dict) else {}
        classes.update(found)
        ranks = [RankFile(str(path), 0, 0, content, model_chunks(content))]
        renumber_layers(ranks)
    else:
        files = CheckpointFiles.of(path)
        folder = find(files, options.iteration)
        ranks = read_ranks(files, folder, classes)
        notes += iteration_notes((files.path / folder).name, ranks[0].content)
    return weights_of_ranks(ranks, classes, options, notes)


def weights_of_ranks(
    ranks: list[RankFile], classes: set[str], options: MegatronOptions, notes: Sequence[str] = ()
) -> Weights:
    """The weights of these ranks, on request with the optimizer's state. notes: from reading the ranks."""
    content, replicas = ranks[0].content, Replicas(options.replicas, {rank.name: rank.content for rank in ranks})
    tables = [
        (rank.tensor_rank, f"{rank.name}" + f", model{n}" * (len(rank.chunks) > 1), chunk)
        for rank in ranks
        for n, chunk in enumerate(rank.chunks)
    ]
    shards = group_by_rank(tables, replicas)
    if not shards or not shards[0]:
        raise CheckpointError(
            f"{ranks[0].name} has no tensors; a file of Megatron holds them under `model` or `module`. Check the path."
        )
    version = 3.0 if is_megatron_core(content) else build.checkpoint_version(content, 0.0)
    return build.build_weights(
        content, version, shards, lambda more: optimizer.read(ranks, more, replicas), classes, options, replicas, notes
    )


FORMAT = Format(
    "megatron: mp_rank_00/model_optim_rng.pt in a folder, in iter_NNNNNNN/ or release/ of it, or in a zip; "
    "or one .pt file",
    recognises,
    MegatronOptions,
    read,
    write,
)
