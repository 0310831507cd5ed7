"""The folders of a run: one run at a time writes them, and what is in them already is never replaced unasked."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator

from megalith.checkpoint.folder import folder_name
from megalith.common.errors import ConfigError
from megalith.common.files import sweep_folder
from megalith.common.locks import locked
from megalith.config.run import RunConfig
from megalith.training.metrics import FILE
from megalith.training.saving import check_folder, folder_of, load_of
from megalith.training.state import Progress

CURE = "Let it end, or name another --run-dir or --save"


@contextlib.contextmanager
def alone(config: RunConfig) -> Iterator[None]:
    """Hold the run's folders against other runs within the block, after looking at what is in them; see check_folder.

    One process alone calls this. Raises LockedError that names the run that writes one of them, with --fresh before anything is moved.
    """
    if config.checkpoint.fresh:
        inner = [lock.parent for folder in _folders(config) for lock in folder.rglob(".lock")]  # runs within them would be moved too
        with _locks(*_folders(config), *inner):
            _check_fresh(config)
        move_aside(config)  # after the locks are given back: they would go along
    with _locks(*_folders(config)):
        if not config.checkpoint.fresh:
            check_folder(config)
        for folder in _folders(config):
            sweep_folder(folder)
        yield


@contextlib.contextmanager
def _locks(*folders: pathlib.Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        for folder in dict.fromkeys(path.resolve() for path in folders):
            held.enter_context(locked(folder, inside=True, patient=True, cure=CURE, notice=_notice))
        yield


def _notice(line: str) -> None:
    print(f"megalith: {line}", flush=True)


def _folders(config: RunConfig) -> tuple[pathlib.Path, pathlib.Path]:
    return pathlib.Path(config.logging.folder), folder_of(config)


def _check_fresh(config: RunConfig) -> None:
    load = load_of(config)
    if load is not None and any(pathlib.Path(load).resolve().is_relative_to(path.resolve()) for path in _folders(config)):
        raise ConfigError(f"--fresh would move --load {load} aside, as it lies in this run's folders; name another --run-dir.")


def move_aside(config: RunConfig) -> None:
    """Give what is in the run's folders another name."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for path in _folders(config):
        if path.exists():
            path.rename(path.with_name(f"{path.name}.before-{stamp}"))


def written(config: RunConfig, progress: Progress) -> str:
    """What a run leaves behind, and where."""
    folder = pathlib.Path(config.logging.folder)
    newest = [f"checkpoint {folder_of(config) / folder_name(progress.saved)}"] if progress.saved is not None else []
    picture = [f"picture {folder / 'loss.png'}"] if (folder / FILE).exists() else []
    return ", ".join([*newest, *picture, f"numbers of every step {folder / FILE}"])
