"""The folders of a run: one run at a time writes them, and what is in them is never replaced without --fresh."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from megalith import checkpoint
from megalith.checkpoint.store.folder import checkpoint_folder, folder_name, load_path
from megalith.common.errors import CheckpointError, ConfigError
from megalith.common.files import remove_leftovers_in
from megalith.common.locks import LockedError, locked
from megalith.config.flags.loading import from_yaml
from megalith.config.run import RunConfig
from megalith.training.predictions import RESULTS_FILE
from megalith.training.reporting.metrics import METRICS_FILE
from megalith.training.resume.saving import check_folder
from megalith.training.resume.state import Progress

CURE = "Let it end, or name another --run-dir or --save"


@contextlib.contextmanager
def hold_folders(config: RunConfig) -> Iterator[Callable[[], None]]:
    """Lock the run's folders against other runs within the block, after a check of what is in them; see check_folder.

    The block gets a function that raises CheckpointError where a lock was lost while this process was suspended.

    Only the main process calls this. Raises LockedError that names the run that writes one of the folders, with --fresh
    before anything is moved.
    """
    if config.checkpoint.fresh:
        # Runs in subfolders would be moved too.
        inner = [lock.parent for folder in _run_folders(config) for lock in folder.rglob(".lock")]
        with _locks(*_run_folders(config), *inner):
            _check_fresh(config)
        move_aside(config)  # after the locks are released, as they would be moved along
    with _locks(*_run_folders(config)) as still_held:
        if not config.checkpoint.fresh:
            check_folder(config)
            _check_record(config)
        for folder in _run_folders(config):
            remove_leftovers_in(folder)
        yield still_held


@contextlib.contextmanager
def _locks(*folders: pathlib.Path) -> Iterator[Callable[[], None]]:
    distinct = dict.fromkeys(path.resolve() for path in folders)
    with contextlib.ExitStack() as held:
        options: dict[str, Any] = {"inside": True, "patient": True, "cure": CURE, "notice": _notice}
        checks = [held.enter_context(locked(folder, **options)) for folder in distinct]

        def still_held() -> None:
            try:
                for check in checks:
                    check()
            except LockedError as error:
                raise CheckpointError(str(error)) from error  # which Ranks raises on all processes as it is

        yield still_held


def _notice(line: str) -> None:
    print(f"megalith: {line}", flush=True)


def _run_folders(config: RunConfig) -> tuple[pathlib.Path, pathlib.Path]:
    return pathlib.Path(config.run_folder), checkpoint_folder(config)


def find_old_run_folder(config: RunConfig) -> str | None:
    """The run folder of a run with --save that began when run folders were runs/<name>; None for all others.

    The run's record is in there; now the run folder is that of --save.
    """
    old, own = pathlib.Path(f"runs/{config.logging.name}"), checkpoint_folder(config)
    follows = config.logging.run_dir is None and config.checkpoint.save is not None and not config.checkpoint.fresh
    if not follows or _has_metrics(own) or not _has_metrics(old) or not checkpoint.iterations(own):
        return None
    then = _last_config(old)
    return str(old) if then is not None and _resolved(then.checkpoint.save) == own.resolve() else None


def _check_record(config: RunConfig) -> None:
    """Raise ConfigError where the run folder has the record of a run that this one does not resume.

    The record of an attempt of this very run that saved nothing is renamed, as the run begins anew.
    """
    run, own, load = pathlib.Path(config.run_folder), checkpoint_folder(config), load_path(config)
    if config.finetuning.epochs == 0 and (run / RESULTS_FILE).exists():
        model = config.finetuning.pretrained_checkpoint or run
        raise ConfigError(
            f"{run} holds predictions and {RESULTS_FILE}, which --epochs 0 would replace. Name another --save (or "
            f"--run-dir) for what is measured, and the model as --pretrained-checkpoint {model}."
        )
    if not _has_metrics(run):
        return
    then = _last_config(run)
    of = _resolved((then.checkpoint.save if then else None) or str(run / "checkpoints"))
    whose = f"{run} holds the record ({METRICS_FILE}) of "
    another = "Name another --run-dir, or leave it out: a run's record then lies in the folder of --save"
    if of != own.resolve() and not (checkpoint.iterations(own) and own.resolve().is_relative_to(run.resolve())):
        raise ConfigError(f"{whose}a run whose checkpoints go to {of}, and those of this one go to {own}. {another}.")
    if checkpoint.iterations(own) or (config.validation.skip_train and load is not None):  # it is appended to
        return
    if load is None or then is None or _resolved(then.checkpoint.load) != _resolved(load):
        begins = "starting over" if load is None else f"beginning with --load {load}"
        raise ConfigError(
            f"{whose}a run, and {own} no checkpoint of it to resume from; {begins} would overwrite it. "
            f"Give --fresh to move it aside and start anew, or name another --run-dir."
        )
    moved = [path.rename(_aside_path(path)).name for path in (run / METRICS_FILE, run / "loss.png") if path.exists()]
    _notice(
        f"the run begins again, as it saved no checkpoint; what it had written in {run} is {' and '.join(moved)} now"
    )


def _aside_path(path: pathlib.Path) -> pathlib.Path:
    """An unused name for what is moved aside: loss.before-20260101-120000.png."""
    # A folder's name may have a point in it, as in run-1.3b.
    stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    while (free := path.with_name(f"{stem}.before-{time.strftime('%Y%m%d-%H%M%S')}{suffix}")).exists():
        time.sleep(0.1)
    return free


def _has_metrics(run: pathlib.Path) -> bool:
    metrics = run / METRICS_FILE
    return metrics.exists() and metrics.stat().st_size > 0


def _last_config(run: pathlib.Path) -> RunConfig | None:
    """The config that the run in this folder was last started with; None where there is none that can be read."""
    try:
        return from_yaml((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _resolved(path: str | None) -> pathlib.Path | None:
    return pathlib.Path(path).resolve() if path is not None else None


def _check_fresh(config: RunConfig) -> None:
    load = load_path(config)
    if load is not None and any(
        pathlib.Path(load).resolve().is_relative_to(path.resolve()) for path in _run_folders(config)
    ):
        raise ConfigError(
            f"--fresh would move --load {load} aside, as it lies in this run's folders; name another --run-dir."
        )


def move_aside(config: RunConfig) -> None:
    """Rename the run's folders."""
    for path in _run_folders(config):
        if path.exists():
            path.rename(_aside_path(path))


def describe_outputs(config: RunConfig, progress: Progress) -> str:
    """What a run has written, and where."""
    folder = pathlib.Path(config.run_folder)
    newest = []
    if progress.saved is not None:
        newest.append(f"checkpoint {checkpoint_folder(config) / folder_name(progress.saved)}")
    trained = progress.iteration and not config.validation.skip_train  # the picture is drawn of training steps
    drawn = trained or (folder / "loss.png").exists()
    picture = [f"picture {folder / 'loss.png'}"] if drawn and (folder / METRICS_FILE).exists() else []
    if best := progress.best:
        where = checkpoint_folder(config) / folder_name(best.step)
        newest.append(f"best checkpoint {where} ({best.metric} {best.value:.6g} on validation data)")
    return ", ".join([*newest, *picture, f"numbers of every step {folder / METRICS_FILE}"])
