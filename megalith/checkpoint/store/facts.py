"""What the small files of a checkpoint say about it, without reading its tensors. No torch."""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

from megalith.checkpoint.store import manifest
from megalith.common.errors import CheckpointError

CONFIG, TRAIN_STATE = "config.yaml", "train_state.json"


def read_config(path: str | os.PathLike) -> str:
    """The text of the config that the checkpoint at `path` was written with (YAML).

    Raises CheckpointError where it was changed since.
    """
    folder = pathlib.Path(path)
    text = _read_text(folder / CONFIG)
    if problems := manifest.compare(folder, {CONFIG: manifest.read(folder)["files"][CONFIG]}):
        raise CheckpointError(f"{problems[0]}. Copy the checkpoint again; to change what a run does, give flags")
    return text


def read_train_state(path: str | os.PathLike) -> dict[str, Any]:
    """What `save` was given as train_state, with iteration, ranks and versions."""
    file = pathlib.Path(path) / TRAIN_STATE
    try:
        return json.loads(_read_text(file))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON ({error})") from None


def written_by_another_run(path: pathlib.Path, run: str | None) -> bool:
    """Whether the checkpoint at `path` names another run than `run` as its writer.

    Converted checkpoints, and those of old releases, name none.
    """
    try:
        return read_train_state(path).get("run") not in (run, None)
    except CheckpointError:
        return False


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """Facts: iteration, schema, written_by, tensors {name: {shape, dtype}}, parameters per part, bytes, and files.

    A part is the first word of a name, and for the optimizer the first two: model, optimizer/exp_avg, ...
    """
    content = manifest.read(path)
    parts: dict[str, int] = {}
    for name, facts in content["tensors"].items():
        parts[part_of(name)] = parts.get(part_of(name), 0) + math.prod(facts["shape"])
    return {
        "path": str(path),
        "iteration": content["iteration"],
        "schema": content["schema"],
        "written_by": content["written_by"],
        "parameters": parts,
        "bytes": sum(facts["bytes"] for facts in content["files"].values()),
        "tensors": content["tensors"],
        "files": content["files"],
    }


def part_of(name: str) -> str:
    """model/layers.0.q.weight -> model; optimizer/exp_avg/layers.0.q.weight -> optimizer/exp_avg."""
    return name.rpartition("/")[0] or name


def _read_text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
