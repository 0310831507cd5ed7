"""Saving: files are written into a temporary folder and verified, the folder is renamed, and then `latest` is updated.

A failure anywhere leaves the last good checkpoint.
"""

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
from megalith.checkpoint.store.facts import CONFIG, TRAIN_STATE, written_by_another_run
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

    state: {canonical name: tensor}, DTensors of any placements among them; ranks may hold different names. A list of
        such dicts (the pipeline stages of one rank) may share names: their tensors must be equal, and are saved once.
        Tensors of one name that are not DTensors must be equal on all ranks that hold them.
    train_state: all else that resuming needs, as JSON can hold it. `iteration`, `versions` and `ranks` are added.
        Where its entry `run` names a run, a checkpoint that names another one is neither replaced nor deleted.
    config_yaml: the resolved config. files: {name in the checkpoint: file to copy}, such as tokenizer/tokenizer.json.
    keep_last, keep_every: which older ones stay, see folder.expired.
    group: None is the default group; without any, this is the only process. `folder` must be the same for all ranks.

    Raises CheckpointError on all ranks where anything failed on any (disk full, tensors that differ). Older
    checkpoints are untouched then, and the partial one is removed.
    """
    request = SaveRequest(pathlib.Path(folder), iteration, train_state, config_yaml, files or {}, keep_last, keep_every)
    merged = merge_stages(state)
    return write(request, merged, {name: store.local(tensor) for name, tensor in merged.items()}, Ranks(group))


class SaveRequest(NamedTuple):
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
        """The run that saves, if train_state names it: what another one wrote is not replaced, nor deleted."""
        return self.train_state.get("run")


def merge_stages(state: State) -> dict[str, Tensor]:
    """One dict of one or several; tensors of one name in two of them must be equal and of one layout.

    Raises CheckpointError otherwise.
    """
    merged: dict[str, Tensor] = {}
    for stage in [state] if isinstance(state, Mapping) else state:
        for name, tensor in stage.items():
            known = merged.setdefault(name, tensor)
            if known is not tensor and not _equal(known, tensor):
                raise CheckpointError(
                    f"two stages of this rank hold copies that differ of {name}; saving one of them would hide that. "
                    f"Nothing was saved. Copies of a shared parameter get the sum of their gradients, which keeps them "
                    f"equal: look for where that is missing."
                )
    return merged


def write(request: SaveRequest, state: dict[str, Tensor], parts: Mapping[str, Tensor], ranks: Ranks) -> pathlib.Path:
    """`save`, of tensors whose layout is that of `state` and whose data are in `parts` (see store.write)."""
    locks: list[int] = []
    try:
        requested = (str(request.folder), request.iteration)
        temporary = ranks.collect(lambda: requested, lambda all_requested: _begin(request, all_requested, locks))
        try:
            tensors, sums = store.write(state, parts, temporary, ranks)
            ranks.collect(lambda: sums, lambda all_sums: _write_manifest(request, temporary, tensors, all_sums))
            ranks.on_every_rank(lambda: _verify_written(temporary, sums, whole=ranks.rank == 0))
            return ranks.on_rank_0(lambda: _publish(request, temporary))
        except BaseException:
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
    except CheckpointError as error:
        reason = str(error).rstrip(".")
        raise CheckpointError(
            f"checkpoint {request.path} was not saved: {reason}. Checkpoints saved before are untouched."
        ) from error
    finally:
        for lock in locks:
            os.close(lock)


def _begin(request: SaveRequest, requested: list[tuple[str, int]], locks: list[int]) -> pathlib.Path:
    """Check that all ranks save the same, remove what killed saves left, and make the temporary folder."""
    if len(set(requested)) > 1:
        raise CheckpointError(
            f"the ranks disagree on what to save where: {sorted(set(requested))}; "
            f"all must name one folder and one iteration."
        )
    if request.iteration < 0:
        raise CheckpointError(
            f"iteration must be at least 0; found {request.iteration}. Pass the number of steps done."
        )
    if request.path.exists() and not (request.path / INDEX).exists() and not (request.path / manifest.NAME).exists():
        # Megatron gives its folders the same names; what another program wrote is not replaced.
        raise CheckpointError(
            f"{request.path} exists and is not a checkpoint of megalith. Save elsewhere (--save), or move it away."
        )
    if written_by_another_run(request.path, request.run):
        raise CheckpointError(f"{request.path} was written by another run. Save elsewhere (--save), or move it away.")
    with contextlib.suppress(OSError):
        folders.clean(request.folder)
    temporary, lock = folders.claim(request.folder, request.iteration)
    locks.append(lock)
    return temporary


def _write_manifest(request: SaveRequest, temporary: pathlib.Path, tensors: dict, sums: list[dict]) -> None:
    """Write the small files and the manifest. sums: {file: facts} of each rank."""
    versions = {"megalith": megalith.__version__, "torch": torch.__version__}
    added = {"iteration": request.iteration, "ranks": len(sums), "versions": versions}
    try:
        small_files = {
            CONFIG: request.config_yaml.encode(),
            TRAIN_STATE: (json.dumps({**added, **request.train_state, **added}, indent=2) + "\n").encode(),
        }
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"train_state cannot be written as JSON ({error}); it may hold numbers, text, lists and dicts."
        ) from None
    entries = {name: facts for of_rank in sums for name, facts in of_rank.items()}
    for name, source in request.files.items():
        path = pathlib.PurePosixPath(name)
        if (
            name in small_files
            or name in entries
            or name == manifest.NAME
            or path.is_absolute()
            or ".." in path.parts
            or str(path) != name
        ):
            raise CheckpointError(
                f"the name of a file must be a path inside the checkpoint that megalith does not use itself; "
                f"found {name!r}."
            )
        small_files[name] = pathlib.Path(source).read_bytes()
    entries |= {name: _write(temporary / name, data) for name, data in small_files.items()}
    written_by = versions | {"ranks": len(sums)}
    content = {
        "iteration": request.iteration,
        "written_by": written_by,
        "tensors": _sorted(tensors),
        "files": _sorted(entries),
    }
    manifest.write(temporary, content)


def _verify_written(temporary: pathlib.Path, sums: dict, *, whole: bool) -> None:
    """Read back what this rank wrote; rank 0 also checks that it sees the files of all ranks."""
    problems = manifest.compare(temporary, sums) + (manifest.check_sizes(temporary) if whole else [])
    if problems:
        raise CheckpointError(
            "; ".join(problems) + ". All ranks must see one folder, on a filesystem that keeps what is written."
        )


def _publish(request: SaveRequest, temporary: pathlib.Path) -> pathlib.Path:
    fsync_directory(temporary)
    path = folders.publish(temporary, request.iteration)
    with contextlib.suppress(OSError):  # the checkpoint is safe; what could not be deleted is tried again next time
        folders.prune(
            request.folder,
            request.iteration,
            request.keep_last,
            request.keep_every,
            deletable=lambda path: not written_by_another_run(path, request.run),
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
