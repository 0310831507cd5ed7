"""Loading: into tensors of any layout, in place; or whole tensors, one after another."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store import dcp as store
from megalith.checkpoint.store import fit, manifest
from megalith.checkpoint.store.facts import read_config, read_train_state
from megalith.checkpoint.store.folder import describe_damage, find
from megalith.checkpoint.store.saving import State
from megalith.checkpoint.tensors.chunked import DcpFolder
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError
from megalith.config.flags.loading import to_yaml


def load(
    folder: str | os.PathLike,
    state: State,
    *,
    iteration: int | None = None,
    strict: bool = True,
    checksums: bool = True,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fill the tensors of `state` in place from a checkpoint and return its train_state.

    All ranks of `group` call it together.

    folder, iteration: see folder.find. state: as in `save`, in any layout, whatever layout wrote it; dtypes are
        converted. Whole parts may be left out (weights without optimizer: no name begins with `optimizer/`).
    strict: within a part asked for, every name of the checkpoint must be asked for, and every name asked for must be
        there. Without it, names that only one side has are left alone. Shapes must fit in any case.
    checksums: read every file once more, divided among the ranks, and compare; without it the disk is trusted.

    Raises CheckpointError on all ranks: a missing or damaged checkpoint (the file, and the newest good one beside it),
    or one that does not fit (each parameter, both shapes, the flag that would make it fit).
    """
    ranks = Ranks(group)
    path: pathlib.Path = ranks.on_rank_0(lambda: find(folder, iteration))
    content = ranks.on_every_rank(lambda: manifest.read(path))
    if checksums:
        verify_on_all_ranks(path, ranks)
    shapes = {name: facts["shape"] for name, facts in content["tensors"].items()}
    _check_fit(str(path), state, shapes, lambda: fit.model_section(read_config(path)), strict, ranks)
    ranks.on_every_rank(lambda: _fill(DcpFolder(path).lazies(), state))
    return read_train_state(path)


def fill(weights: Weights, state: State, *, strict: bool = True, group: dist.ProcessGroup | None = None) -> None:
    """As `load`, from weights of any format that every rank has opened. All ranks of `group` call it together."""
    ranks, shapes = Ranks(group), {name: list(lazy.shape) for name, lazy in weights.tensors.items()}
    _check_fit(weights.source, state, shapes, lambda: fit.model_section(to_yaml(weights.config)), strict, ranks)
    ranks.on_every_rank(lambda: _fill(weights.tensors, state))


def read_tensors(path: str | os.PathLike, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors of the checkpoint at `path`, one at a time, on the CPU: (name, tensor) in the order of `names`.

    For one process without a group; memory is that of the largest tensor. names: None gives all, sorted. Checksums are
    not compared: see verify. Raises CheckpointError for a name that is not there.
    """
    path = pathlib.Path(path)
    known = manifest.read(path)["tensors"]
    wanted = list(known) if names is None else list(names)
    missing = sorted(set(wanted) - set(known))
    if missing:
        raise CheckpointError(fit.report(path, [f"{name}: not in the checkpoint" for name in missing]))
    stored = DcpFolder(path)
    for name in wanted:
        tensor = torch.empty(known[name]["shape"], dtype=getattr(torch, known[name]["dtype"]))
        store.fill({name: stored.lazy(name)}, {name: tensor})
        yield name, tensor


def read_full(path: str | os.PathLike, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """As `read_tensors`, all at once."""
    return dict(read_tensors(path, names))


def verify_on_all_ranks(path: pathlib.Path, ranks: Ranks) -> None:
    """Compare all checksums, each rank those of some files; raise CheckpointError on all ranks where one differs."""

    def raise_problems(parts: list[list[str]]) -> None:
        problems = [text for part in parts for text in part]
        if problems:
            raise CheckpointError(describe_damage(path, problems))

    ranks.collect(lambda: manifest.verify(path, part=(ranks.rank, ranks.size)), raise_problems)


def _stages(state: State) -> list[Mapping[str, Tensor]]:
    return [state] if isinstance(state, Mapping) else list(state)


def _fill(tensors: Mapping[str, Lazy], state: State) -> None:
    for stage in _stages(state):
        store.fill(tensors, {name: tensor for name, tensor in stage.items() if name in tensors})


def _check_fit(
    source: str,
    state: State,
    found: Mapping[str, list[int]],
    model: Callable[[], Mapping[str, Any]],
    strict: bool,
    ranks: Ranks,
) -> None:
    """Raise CheckpointError on all ranks where what they ask for is not `found` in a checkpoint of `model`."""
    local_shapes = {name: list(tensor.shape) for stage in _stages(state) for name, tensor in stage.items()}

    def raise_problems(tables: list[dict[str, list[int]]]) -> None:
        asked = {name: shape for table in tables for name, shape in table.items()}
        if lines := fit.differences(asked, found, model(), strict=strict):
            raise CheckpointError(fit.report(source, lines))

    ranks.collect(lambda: local_shapes, raise_problems)
