"""Saving: written aside, verified, renamed, then the pointer; a failure anywhere leaves the last good checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import megalith
from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store import dcp as store
from megalith.checkpoint.store import folder as folders
from megalith.checkpoint.store import manifest
from megalith.checkpoint.store.facts import CONFIG, TRAIN_STATE, written_by_another
from megalith.checkpoint.tensors.chunked import INDEX
from megalith.common.errors import CheckpointError
from megalith.common.files import fsync_directory, sha256

State = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]


def save(
    folder: str | os.PathLike,
    iteration: int,
    state: State,
    *,
    train_state: Mapping[str, Any],
    config_yaml: str,
    files: Mapping[str, str | os.PathLike] | None = None,
    keep_last: int = 3,
    keep_every: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> pathlib.Path:
    """Save a checkpoint into `folder`/iter_NNNNNNN and return its path. All ranks of `group` call it together.

    state: {canonical name: tensor}, plain or DTensor of any placements; ranks may hold different names. A list of such
        dicts (the pipeline stages of one rank) may share names: their tensors must be equal, and are saved once, as must
        plain tensors of one name on several ranks be.
    train_state: JSON-able, everything else that going on needs. `iteration`, `versions` and `ranks` are added. Where its entry
        `run` names a run, a checkpoint that names another one is neither replaced nor deleted.
    config_yaml: the resolved config. files: {name in the checkpoint: file to copy}, such as
        tokenizer/tokenizer.json.
    keep_last, keep_every: which older ones stay, see folder.expired.
    group: None is the default group; without any, this process is alone. `folder` must be one and the same for all.

    Raises CheckpointError on all ranks where anything failed on any (disk full, tensors that disagree). What was there
    before is untouched then, and the partial one is gone.
    """
    order = Order(pathlib.Path(folder), iteration, train_state, config_yaml, files or {}, keep_last, keep_every)
    merged = merge(state)
    return write(order, merged, {name: store.local(tensor) for name, tensor in merged.items()}, Ranks(group))


class Order(NamedTuple):
    """What `save` was asked for, except the tensors."""

    folder: pathlib.Path
    iteration: int
    train_state: Mapping[str, Any]
    config_yaml: str
    files: Mapping[str, str | os.PathLike]
    keep_last: int
    keep_every: int | None

    @property
    def path(self) -> pathlib.Path:
        """Where the checkpoint will be."""
        return self.folder / folders.folder_name(self.iteration)

    @property
    def run(self) -> str | None:
        """The run that saves, if it says so: what another one wrote is not replaced, nor deleted."""
        return self.train_state.get("run")


def merge(state: State) -> dict[str, Tensor]:
    """One dict of one or several; a name in two of them must mean equal tensors of one layout, else CheckpointError."""
    merged: dict[str, Tensor] = {}
    for stage in [state] if isinstance(state, Mapping) else state:
        for name, tensor in stage.items():
            known = merged.setdefault(name, tensor)
            if known is not tensor and not _equal(known, tensor):
                raise CheckpointError(
                    f"{name}: two stages of this rank hold copies that differ; saving one would hide it. Nothing was saved. "
                    f"Copies of a shared parameter get the sum of their gradients and so stay equal: look there."
                )
    return merged


def write(order: Order, state: dict[str, Tensor], parts: Mapping[str, Tensor], ranks: Ranks) -> pathlib.Path:
    """`save`, of tensors whose layout is that of `state` and whose data are in `parts` (see store.write)."""
    locks: list[int] = []
    try:
        asked = (str(order.folder), order.iteration)
        temporary = ranks.collect(lambda: asked, lambda all_asked: _begin(order, all_asked, locks))
        try:
            tensors, sums = store.write(state, parts, temporary, ranks)
            ranks.collect(lambda: sums, lambda all_sums: _seal(order, temporary, tensors, all_sums))
            ranks.every(lambda: _check(temporary, sums, whole=ranks.rank == 0))
            return ranks.first(lambda: _publish(order, temporary))
        except BaseException:
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
    except CheckpointError as error:
        reason = str(error).rstrip(".")
        raise CheckpointError(
            f"checkpoint {order.path} was not saved: {reason}. Checkpoints saved before are untouched."
        ) from error
    finally:
        for lock in locks:
            os.close(lock)


def _begin(order: Order, asked: list[tuple[str, int]], locks: list[int]) -> pathlib.Path:
    """Check that all ranks mean the same, clear what killed saves left, and make the temporary folder."""
    if len(set(asked)) > 1:
        raise CheckpointError(
            f"ranks disagree on what to save where: {sorted(set(asked))}; all must name one folder and iteration"
        )
    if order.iteration < 0:
        raise CheckpointError(
            f"iteration: found {order.iteration}; iterations count from 0. Pass the number of steps done"
        )
    if order.path.exists() and not (order.path / INDEX).exists() and not (order.path / manifest.NAME).exists():
        # Megatron names its folders alike; what another program wrote is not ours to replace.
        raise CheckpointError(
            f"{order.path} exists and is no checkpoint of megalith. Save elsewhere (--save), or move it away"
        )
    if written_by_another(order.path, order.run):
        raise CheckpointError(f"{order.path} was written by another run. Save elsewhere (--save), or move it away")
    with contextlib.suppress(OSError):
        folders.clean(order.folder)
    temporary, lock = folders.claim(order.folder, order.iteration)
    locks.append(lock)
    return temporary


def _seal(order: Order, temporary: pathlib.Path, tensors: dict, sums: list[dict]) -> None:
    """Write the small files and the manifest. sums: {file: facts} of each rank."""
    versions = {"megalith": megalith.__version__, "torch": torch.__version__}
    added = {"iteration": order.iteration, "ranks": len(sums), "versions": versions}
    try:
        own = {
            CONFIG: order.config_yaml.encode(),
            TRAIN_STATE: (json.dumps({**added, **order.train_state, **added}, indent=2) + "\n").encode(),
        }
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"train_state holds what JSON cannot ({error}); it takes numbers, text, lists and dicts"
        ) from None
    entries = {name: facts for mine in sums for name, facts in mine.items()}
    for name, source in order.files.items():
        path = pathlib.PurePosixPath(name)
        if (
            name in own
            or name in entries
            or name == manifest.NAME
            or path.is_absolute()
            or ".." in path.parts
            or str(path) != name
        ):
            raise CheckpointError(
                f"file {name!r}: the name must be of a file inside the checkpoint that it does not use itself"
            )
        own[name] = pathlib.Path(source).read_bytes()
    entries |= {name: _write(temporary / name, data) for name, data in own.items()}
    written_by = versions | {"ranks": len(sums)}
    content = {
        "iteration": order.iteration,
        "written_by": written_by,
        "tensors": _sorted(tensors),
        "files": _sorted(entries),
    }
    manifest.write(temporary, content)


def _check(temporary: pathlib.Path, sums: dict, *, whole: bool) -> None:
    """Read back what this rank wrote; rank 0 also looks whether it sees the files of all."""
    problems = manifest.compare(temporary, sums) + (manifest.glance(temporary) if whole else [])
    if problems:
        raise CheckpointError(
            "; ".join(problems) + ". All ranks must see one folder, on a filesystem that keeps what is written"
        )


def _publish(order: Order, temporary: pathlib.Path) -> pathlib.Path:
    fsync_directory(temporary)
    path = folders.publish(temporary, order.iteration)
    with contextlib.suppress(OSError):  # the checkpoint is safe; what could not be deleted is tried again next time
        folders.retain(
            order.folder,
            order.iteration,
            order.keep_last,
            order.keep_every,
            ours=lambda path: not written_by_another(path, order.run),
        )
    return path


def _equal(one: Tensor, other: Tensor) -> bool:
    def layout(tensor: Tensor) -> tuple:
        return (
            tensor.shape,
            tensor.dtype,
            (tensor.placements, tensor.device_mesh) if isinstance(tensor, DTensor) else None,
        )

    return layout(one) == layout(other) and store.fingerprint(store.local(one)) == store.fingerprint(store.local(other))


def _sorted(table: dict) -> dict:
    return dict(sorted(table.items()))


def _write(path: pathlib.Path, data: bytes) -> dict:
    """Write a small file durably; its manifest entry."""
    path.parent.mkdir(parents=True, exist_ok=True)  # it may lie in a folder of its own, such as tokenizer/
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(path.parent)
    return {"bytes": len(data), "sha256": sha256(path)}
