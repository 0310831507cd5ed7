"""The folders of a run: one run at a time writes them, and what is in them already is never replaced unasked."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from megalith import checkpoint
from megalith.checkpoint.store.folder import folder_name, folder_of, load_of
from megalith.common.errors import CheckpointError, ConfigError
from megalith.common.files import sweep_folder
from megalith.common.locks import LockedError, locked
from megalith.config.flags.loading import from_yaml
from megalith.config.run import RunConfig
from megalith.training.reporting.metrics import FILE
from megalith.training.resume.saving import check_folder
from megalith.training.resume.state import Progress

CURE = "Let it end, or name another --run-dir or --save"


@contextlib.contextmanager
def alone(config: RunConfig) -> Iterator[Callable[[], None]]:
    """Hold the run's folders against other runs within the block, after looking at what is in them; see check_folder.

    The block gets a check: CheckpointError where they were lost while this process was suspended.

    One process alone calls this. Raises LockedError that names the run that writes one of them, with --fresh before anything is moved.
    """
    if config.checkpoint.fresh:
        inner = [
            lock.parent for folder in _folders(config) for lock in folder.rglob(".lock")
        ]  # runs within them would be moved too
        with _locks(*_folders(config), *inner):
            _check_fresh(config)
        move_aside(config)  # after the locks are given back: they would go along
    with _locks(*_folders(config)) as still_held:
        if not config.checkpoint.fresh:
            check_folder(config)
            _check_record(config)
        for folder in _folders(config):
            sweep_folder(folder)
        yield still_held


@contextlib.contextmanager
def _locks(*folders: pathlib.Path) -> Iterator[Callable[[], None]]:
    places = dict.fromkeys(path.resolve() for path in folders)
    with contextlib.ExitStack() as held:
        options: dict[str, Any] = {"inside": True, "patient": True, "cure": CURE, "notice": _notice}
        checks = [held.enter_context(locked(folder, **options)) for folder in places]

        def still_held() -> None:
            try:
                for check in checks:
                    check()
            except LockedError as error:
                raise CheckpointError(str(error)) from error  # which Ranks hands to all processes as it is

        yield still_held


def _notice(line: str) -> None:
    print(f"megalith: {line}", flush=True)


def _folders(config: RunConfig) -> tuple[pathlib.Path, pathlib.Path]:
    return pathlib.Path(config.run_folder), folder_of(config)


def old_place(config: RunConfig) -> str | None:
    """The run folder of a run that began before it followed --save: runs/<name>, where its record lies; None for all others."""
    old, own = pathlib.Path(f"runs/{config.logging.name}"), folder_of(config)
    follows = config.logging.run_dir is None and config.checkpoint.save is not None and not config.checkpoint.fresh
    if not follows or _written(own) or not _written(old) or not checkpoint.iterations(own):
        return None
    then = _begun(old)
    return str(old) if then is not None and _resolved(then.checkpoint.save) == own.resolve() else None


def _check_record(config: RunConfig) -> None:
    """Raise ConfigError where a run folder's record is of a run that this one does not go on with.

    The record of an attempt of this very run that saved nothing is given another name, as the run begins anew.
    """
    run, own, load = pathlib.Path(config.run_folder), folder_of(config), load_of(config)
    if not _written(run):
        return
    then = _begun(run)
    of = _resolved((then.checkpoint.save if then else None) or str(run / "checkpoints"))
    whose = f"{run} holds the record ({FILE}) of "
    another = "Name another --run-dir, or leave it out: a run's record then lies in the folder of --save"
    if of != own.resolve() and not (checkpoint.iterations(own) and own.resolve().is_relative_to(run.resolve())):
        raise ConfigError(f"{whose}a run whose checkpoints go to {of}, and those of this one go to {own}. {another}.")
    if checkpoint.iterations(own) or (
        config.validation.skip_train and load is not None
    ):  # which measures, and adds to it
        return
    if load is None or then is None or _resolved(then.checkpoint.load) != _resolved(load):
        begins = "starting over" if load is None else f"beginning with --load {load}"
        raise ConfigError(
            f"{whose}a run, and {own} no checkpoint of it to resume from; {begins} would overwrite it. "
            f"Give --fresh to move it aside and start anew, or name another --run-dir."
        )
    moved = [path.rename(_before(path)).name for path in (run / FILE, run / "loss.png") if path.exists()]
    _notice(
        f"the run begins again, as it saved no checkpoint; what it had written in {run} is {' and '.join(moved)} now"
    )


def _before(path: pathlib.Path) -> pathlib.Path:
    """A name that is free, for what is moved aside: loss.before-20260101-120000.png."""
    stem, suffix = (
        (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    )  # a folder's name may have a point in it: run-1.3b
    while (free := path.with_name(f"{stem}.before-{time.strftime('%Y%m%d-%H%M%S')}{suffix}")).exists():
        time.sleep(0.1)
    return free


def _written(run: pathlib.Path) -> bool:
    metrics = run / FILE
    return metrics.exists() and metrics.stat().st_size > 0


def _begun(run: pathlib.Path) -> RunConfig | None:
    """The config that the run in this folder was last started with; None where there is none that can be read."""
    try:
        return from_yaml((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _resolved(path: str | None) -> pathlib.Path | None:
    return pathlib.Path(path).resolve() if path is not None else None


def _check_fresh(config: RunConfig) -> None:
    load = load_of(config)
    if load is not None and any(
        pathlib.Path(load).resolve().is_relative_to(path.resolve()) for path in _folders(config)
    ):
        raise ConfigError(
            f"--fresh would move --load {load} aside, as it lies in this run's folders; name another --run-dir."
        )


def move_aside(config: RunConfig) -> None:
    """Give what is in the run's folders another name."""
    for path in _folders(config):
        if path.exists():
            path.rename(_before(path))


def written(config: RunConfig, progress: Progress) -> str:
    """What a run leaves behind, and where."""
    folder = pathlib.Path(config.run_folder)
    newest = [f"checkpoint {folder_of(config) / folder_name(progress.saved)}"] if progress.saved is not None else []
    drawn = (progress.iteration and not config.validation.skip_train) or (
        folder / "loss.png"
    ).exists()  # of steps alone
    picture = [f"picture {folder / 'loss.png'}"] if drawn and (folder / FILE).exists() else []
    return ", ".join([*newest, *picture, f"numbers of every step {folder / FILE}"])
