"""Loading: into tensors of any layout, in place; or whole tensors, one after another."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalith.checkpoint import fit, manifest, store
from megalith.checkpoint.chunked import Chunked
from megalith.checkpoint.facts import read_config, read_train_state
from megalith.checkpoint.folder import damage, find
from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.saving import State
from megalith.common.errors import CheckpointError


def load(
    folder: str | os.PathLike,
    state: State,
    *,
    iteration: int | None = None,
    strict: bool = True,
    checksums: bool = True,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fill the tensors of `state` in place from a checkpoint and return its train_state. All ranks of `group` call it together.

    folder, iteration: see folder.find. state: as in `save`, in any layout, whatever layout wrote it; dtypes are converted. Whole
        parts may be left out (weights without optimizer: no name begins with `optimizer/`).
    strict: within a part asked for, every name of the checkpoint must be asked for, and every name asked for must be there.
        Without it, names that only one side has are left alone. Shapes must fit in any case.
    checksums: read every file once more, shared among the ranks, and compare; the alternative is to trust the disk.

    Raises CheckpointError on all ranks: a missing or damaged checkpoint (the file, and the newest good one beside it), or one
    that does not fit (each parameter, both shapes, the flag that would make it fit).
    """
    ranks = Ranks(group)
    stages = [state] if isinstance(state, Mapping) else list(state)
    path: pathlib.Path = ranks.first(lambda: find(folder, iteration))
    content = ranks.every(lambda: manifest.read(path))
    if checksums:
        verify_together(path, ranks)
    asked = {name: list(tensor.shape) for stage in stages for name, tensor in stage.items()}
    ranks.collect(lambda: asked, lambda tables: _check(path, _union(tables), content["tensors"], strict))

    def read() -> None:
        chunked = Chunked(path)
        for stage in stages:
            store.read(chunked, {name: tensor for name, tensor in stage.items() if name in content["tensors"]})

    ranks.every(read)
    return read_train_state(path)


def read_tensors(path: str | os.PathLike, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors of the checkpoint at `path`, one at a time, on the CPU: (name, tensor) in the order of `names`.

    For one process without a group; memory is that of the largest tensor. names: None gives all, sorted. Checksums are not
    read: see verify. Raises CheckpointError for a name that is not there.
    """
    path = pathlib.Path(path)
    known = manifest.read(path)["tensors"]
    wanted = list(known) if names is None else list(names)
    missing = sorted(set(wanted) - set(known))
    if missing:
        raise CheckpointError(fit.report(path, [f"{name}: not in the checkpoint" for name in missing]))
    chunked = Chunked(path)
    for name in wanted:
        tensor = torch.empty(known[name]["shape"], dtype=getattr(torch, known[name]["dtype"]))
        store.read(chunked, {name: tensor})
        yield name, tensor


def read_full(path: str | os.PathLike, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """As `read_tensors`, all at once."""
    return dict(read_tensors(path, names))


def verify_together(path: pathlib.Path, ranks: Ranks) -> None:
    """Compare all checksums, each rank a share of the files; raise CheckpointError everywhere where one differs."""

    def judge(parts: list[list[str]]) -> None:
        problems = [text for part in parts for text in part]
        if problems:
            raise CheckpointError(damage(path, problems))

    ranks.collect(lambda: manifest.verify(path, part=(ranks.rank, ranks.size)), judge)


def _check(path: pathlib.Path, asked: dict[str, list[int]], found: dict[str, dict], strict: bool) -> None:
    shapes = {name: facts["shape"] for name, facts in found.items()}
    lines = fit.differences(asked, shapes, fit.model_section(read_config(path)), strict=strict)
    if lines:
        raise CheckpointError(fit.report(path, lines))


def _union(tables: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    return {name: shape for table in tables for name, shape in table.items()}
