"""Where Accelerator.save_state and load_state find their folders, and what is in these before and after."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import time
from typing import Any

from megalith import checkpoint
from megalith.checkpoint.store.folder import POINTER, checkpoint_paths
from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.common.files import remove_leftovers, temporary_path
from megalith.common.locks import locked
from megalith.config.flags.text import Words

NAME = "accelerate"  # of the folder of Accelerate's files in a checkpoint, and of their entry in train_state.json
NUMBERED = re.compile(r"checkpoint_(\d+)")  # folders of automatic_checkpoint_naming


def target(accelerator: Any, output_dir: str | os.PathLike | None) -> pathlib.Path:
    """The folder to save into, which is made. Raises ConfigError or CheckpointError where there is none to use."""
    project = accelerator.project_configuration
    if project.automatic_checkpoint_naming:
        folder = _project_folder(accelerator) / f"checkpoint_{accelerator.save_iteration}"
        if checkpoint.iterations(folder):
            rule = "exists, and a numbered checkpoint is not replaced"
            cure = "Call accelerator.load_state() to resume, or set accelerator.project_configuration.iteration"
            raise CheckpointError(problem("save_state", str(folder), rule, cure))
    elif output_dir is None:
        cure = "Give a folder, or ProjectConfiguration(automatic_checkpoint_naming=True)"
        raise ConfigError(problem("save_state: output_dir", None, "must be given", cure))
    else:
        folder = pathlib.Path(output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def source(accelerator: Any, input_dir: str | os.PathLike | None) -> pathlib.Path:
    """The folder to load. Raises ConfigError or CheckpointError where there is none."""
    if input_dir is not None:
        folder = pathlib.Path(input_dir).expanduser()
        if not folder.is_dir():
            rule = "must be given a folder that exists"
            raise CheckpointError(problem("load_state", str(folder), rule, "Correct the path"))
        return folder
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        cure = "Give a folder, or ProjectConfiguration(automatic_checkpoint_naming=True)"
        raise ConfigError(problem("load_state: input_dir", None, "must be given", cure))
    folder = _project_folder(accelerator)
    complete = [each for each in _numbered(folder) if checkpoint.iterations(each)]
    if not complete:
        rule = "must hold a checkpoint of save_state"
        raise CheckpointError(problem(f"{folder}", Words("none"), rule, "Give input_dir, or do not load"))
    return complete[-1]


def begin_saving(folder: pathlib.Path, run: str, held: contextlib.ExitStack) -> tuple[str, str | None]:
    """Lock the folder, and make a temporary one in it; another run's checkpoints are moved aside.

    Returns the temporary folder, and where another run's checkpoints are now.
    """
    held.enter_context(locked(folder, inside=True))
    remove_leftovers(folder / NAME)
    others = [path for path in checkpoint_paths(folder) if path.parent == folder and _run_of(path) != run]
    aside = folder / time.strftime("before-%Y%m%d-%H%M%S")
    if others:
        aside.mkdir()
        pointer = folder / POINTER
        if pointer.is_file() and pointer.read_text(encoding="utf-8").strip() in [path.name for path in others]:
            others.append(pointer)
        for path in others:
            path.rename(aside / path.name)
    staging = temporary_path(folder / NAME)
    (staging / NAME).mkdir(parents=True)
    return str(staging), str(aside) if others else None


def delete_oldest(newest: pathlib.Path, limit: int) -> None:
    """Delete the numbered checkpoints beside the newest one that are more than `limit` together, oldest first."""
    numbered = _numbered(newest.parent)
    for path in numbered[: max(0, len(numbered) - limit)]:
        if path != newest:
            shutil.rmtree(path)


def _project_folder(accelerator: Any) -> pathlib.Path:
    if accelerator.project_dir is None:
        cure = "Give Accelerator(project_dir=...), or ProjectConfiguration(project_dir=...)"
        raise ConfigError(problem("project_dir", None, "must be given for automatic_checkpoint_naming", cure))
    return pathlib.Path(accelerator.project_dir).expanduser() / "checkpoints"


def _numbered(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders of automatic_checkpoint_naming, in the order of their numbers."""
    found = [(NUMBERED.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ())]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def _run_of(path: pathlib.Path) -> str | None:
    """The run that wrote a checkpoint; None where it does not say."""
    try:
        return checkpoint.read_train_state(path).get("run")
    except CheckpointError:  # damaged
        return None
