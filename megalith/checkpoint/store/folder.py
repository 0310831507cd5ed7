"""A folder of checkpoints: `iter_0000100/` and its like, and the text file `latest` that names the one to go on from. No torch.

What is not finished has another name, so that a reader never sees half of anything, wherever a kill strikes:

    .iter_0000100.<random>.saving      being written, locked by its writer; stale when nobody holds the lock
    .iter_0000100.<random>.replaced    the old one while a new one of its number takes its place; counts until then
    .iter_0000100.<random>.removing    being deleted
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence

from megalith.checkpoint.store import manifest
from megalith.common import files
from megalith.common.errors import CheckpointError, problem
from megalith.common.locks import locked
from megalith.config.run import RunConfig

POINTER = "latest"
FINISHED = re.compile(r"iter_(\d{7,})")
UNFINISHED = re.compile(r"\.iter_(\d{7,})\.[0-9a-f]+\.(saving|replaced|removing)")
STRANGE = (  # what lies in checkpoints of other programs
    "latest_checkpointed_iteration.txt", "mp_rank_*", "iter_*/mp_rank_*", "release/mp_rank_*", "global_step*", "config.json",
    "*.safetensors", "pytorch_model*.bin", "metadata.json", "iter_*/metadata.json",
)  # fmt: skip
CONVERTED = (  # what a conversion writes into its folder
    "iter_*", "release", POINTER, "latest_checkpointed_iteration.txt", "config.json", "generation_config.json", "*.safetensors",
    "*.safetensors.index.json", "pytorch_model*", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.model", "*.jinja",
)  # fmt: skip
LAST = (
    POINTER,
    "latest_checkpointed_iteration.txt",
    "config.json",
)  # without these nobody takes a folder for a whole one
ABANDONED = 24 * 3600.0  # seconds after which a writer is taken for dead on a filesystem without locks


def check_new(folder: pathlib.Path) -> None:
    """Raise CheckpointError where a conversion's folder is there already and holds something, or is none."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder, and a converted checkpoint goes into one. Name a new folder.")
    if os.path.lexists(folder) and _content(folder):
        raise CheckpointError(
            f"{folder} exists and is not empty; a converted checkpoint goes into a new folder. Name another one, or add --overwrite."
        )


@contextlib.contextmanager
def new_folder(
    folder: str | os.PathLike,
    *,
    inputs: Sequence[str | os.PathLike] = (),
    overwrite: bool = False,
    notice: Callable[[str], None] = lambda line: None,
) -> Iterator[pathlib.Path]:
    """Give a temporary folder whose content is moved into `folder` when the block ends, and removed where it fails.

    overwrite: put it in the place of an earlier conversion, and of nothing else. Raises LockedError while another process writes
    `folder`, CheckpointError where it holds something that stays, or where it holds one of `inputs` or is in it.
    """
    folder = pathlib.Path(os.path.realpath(folder))
    if not folder.is_dir():
        check_new(folder)
    with locked(folder, inside=True, notice=notice) as still_held:  # the lock that a run takes of its folders
        new, old = folder / "new", folder / "old"
        for each in (new, old):
            files.sweep(each, notice)
        _check_target(folder, inputs, overwrite)
        new, old = files.aside(new), files.aside(old)
        try:
            for each in (new, old):
                each.mkdir()
            yield new
            still_held()
            _move(folder, _content(folder), old)
            _move(new, sorted(os.listdir(new), key=lambda name: name in LAST), folder)
            files.fsync_directory(folder)
        finally:
            for each in (new, old):
                shutil.rmtree(each, ignore_errors=True)


def _check_target(folder: pathlib.Path, inputs: Sequence[str | os.PathLike], overwrite: bool) -> None:
    for each in map(pathlib.Path, map(os.path.realpath, inputs)):
        if each == folder or (_content(folder) and (folder in each.parents or each in folder.parents)):
            rule = f"it is read from {each}, and what is read is never written over"
            raise CheckpointError(problem("target", str(folder), rule, "Name a new folder"))
    if not overwrite:
        check_new(folder)
    strange = [name for name in _content(folder) if not any(fnmatch.fnmatch(name, pattern) for pattern in CONVERTED)]
    if strange:
        rule = "no conversion writes that, and --overwrite replaces an earlier conversion alone"
        raise CheckpointError(
            problem(f"{folder}", sorted(strange)[:5], rule, "Name another folder, or move away what it holds")
        )


def _content(folder: pathlib.Path) -> list[str]:
    """The names in a folder, without those of a lock and of what is being written; [] where there is no folder."""
    return (
        [name for name in os.listdir(folder) if not name.startswith((".lock", ".new.", ".old."))]
        if folder.is_dir()
        else []
    )


def _move(source: pathlib.Path, names: Sequence[str], target: pathlib.Path) -> None:
    for name in names:
        os.rename(source / name, target / name)


def folder_name(iteration: int) -> str:
    """100 -> iter_0000100, as Megatron names them."""
    return f"iter_{iteration:07d}"


def iteration_of(path: pathlib.Path) -> int:
    """iter_0000100 -> 100, finished or waiting to be replaced."""
    match = FINISHED.fullmatch(path.name) or UNFINISHED.fullmatch(path.name)
    if match is None:
        raise AssertionError(f"{path} does not have the name of a checkpoint")
    return int(match[1])


def iterations(folder: str | os.PathLike) -> list[int]:
    """The iterations that have a checkpoint in `folder`, ascending; [] where there is none or no folder."""
    return sorted(number for number, path in _checkpoints(root(folder)).items() if (path / manifest.NAME).exists())


def is_ours(folder: str | os.PathLike) -> bool:
    """Whether `folder` is a checkpoint of megalith, or holds one."""
    return (pathlib.Path(folder) / manifest.NAME).exists() or bool(iterations(folder))


def paths(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The folders of all checkpoints in `folder`, by iteration, damaged ones among them."""
    return [path for _, path in sorted(_checkpoints(root(folder)).items())]


def latest(folder: str | os.PathLike) -> int | None:
    """The iteration that training goes on from: what `latest` names, or the newest where that file is missing; None if none.

    It may be damaged: `find` tells.
    """
    try:
        text = (root(folder) / POINTER).read_text(encoding="utf-8").strip()
    except OSError:
        return max(iterations(folder), default=None)
    match = FINISHED.fullmatch(text)
    if not match:
        if hint := strange(folder):
            raise CheckpointError(hint)
        raise CheckpointError(
            f"{root(folder) / POINTER}: found {text[:40]!r}; it must hold the name of a checkpoint such as {folder_name(100)}. "
            f"{offer(folder)}"
        )
    return int(match[1])


def find(folder: str | os.PathLike, iteration: int | None = None) -> pathlib.Path:
    """The path of a checkpoint: that of `iteration`, or the one that `latest` names.

    folder: a folder of checkpoints, a run's folder that holds `checkpoints/`, or one checkpoint itself.
    Raises CheckpointError where it is missing or where a file of it is missing or has a wrong size, and names the newest
    good one. (Checksums are compared by `load` and `verify`: reading everything here would double the time of a start.)
    """
    place = pathlib.Path(folder)
    if (place / manifest.NAME).exists() and iteration is None:
        path = place
    else:
        wanted = latest(folder) if iteration is None else iteration
        if wanted is None:
            if hint := strange(folder) or runs_in(folder):
                raise CheckpointError(hint)
            raise CheckpointError(
                f"{place}: no checkpoint found; it would be a folder such as {folder_name(100)} in it. Check the path."
            )
        found = _checkpoints(root(folder)).get(wanted)
        if found is None:
            raise CheckpointError(f"{root(folder) / folder_name(wanted)} is missing. {offer(folder, wanted)}")
        path = found
    problems = manifest.glance(path)
    if problems:
        raise CheckpointError(damage(path, problems))
    return path


def strange(folder: str | os.PathLike) -> str:
    """What to tell of a folder (or file) with a checkpoint of another program; "" where there is none."""
    place = pathlib.Path(folder)
    found = [place] if place.is_file() else [path for pattern in STRANGE for path in sorted(place.glob(pattern))[:1]]
    if not found:
        return ""
    return (
        f"{place}: found {found[0].name}, as checkpoints of other programs have it; checkpoints of megalith are folders such as "
        f"{folder_name(100)}. Write megalith checkpoint import {place} FOLDER, and name that folder instead."
    )


def runs_in(folder: str | os.PathLike) -> str:
    """A sentence that names the folders in `folder` that have checkpoints themselves, newest first; '' where there are none."""
    place, most = pathlib.Path(folder), 8
    found = [each for each in place.iterdir() if each.is_dir() and iterations(each)] if place.is_dir() else []
    if not found:
        return ""
    found.sort(key=lambda each: root(each).stat().st_mtime, reverse=True)
    named = ", ".join(f"{each} (step {max(iterations(each))})" for each in found[:most])
    more = f" and {len(found) - most} more" * (len(found) > most)
    return f"{place} is a folder of runs; name one of them: {named}{more}."


def damage(path: pathlib.Path, problems: list[str]) -> str:
    """The message for a damaged checkpoint at `path`: the files, and the newest good one beside it."""
    number = FINISHED.fullmatch(path.name)
    return "\n".join([*problems, offer(path.parent, int(number[1]) if number else None)])


def offer(folder: str | os.PathLike, other_than: int | None = None) -> str:
    """A sentence that offers the newest good checkpoint of `folder`; every candidate's checksums are read."""
    for number, path in sorted(_checkpoints(root(folder)).items(), reverse=True):
        if number != other_than and not manifest.verify(path):
            return f"The newest good checkpoint beside it is of iteration {number}: load it with --ckpt-step {number}."
    return "There is no other good checkpoint beside it."


def root(folder: str | os.PathLike) -> pathlib.Path:
    """The folder that holds the checkpoints: `folder`, or `folder`/checkpoints where it is a run's folder."""
    folder = pathlib.Path(folder)
    inner = folder / "checkpoints"
    return inner if inner.is_dir() and not (folder / POINTER).exists() else folder


def folder_of(config: RunConfig) -> pathlib.Path:
    """Where the run's checkpoints lie."""
    return pathlib.Path(config.checkpoint.save or f"{config.run_folder}/checkpoints")


def load_of(config: RunConfig) -> str | None:
    """--load, unless it is the run's own folder: scripts name one folder for both, and mean "go on, if there is something"."""
    load = config.checkpoint.load
    return None if load is not None and root(load).resolve() == folder_of(config).resolve() else load


def claim(folder: pathlib.Path, iteration: int) -> tuple[pathlib.Path, int]:
    """Make a `.saving` folder and lock it; returns it and the descriptor that holds the lock while it is open."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _aside(folder, iteration, "saving")
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass  # a filesystem without locks: age tells then, see ABANDONED
    return path, descriptor


def publish(temporary: pathlib.Path, iteration: int) -> pathlib.Path:
    """Give a complete, synced `.saving` folder its name, then move the pointer to it. Returns the new path."""
    folder = temporary.parent
    final = folder / folder_name(iteration)
    replaced = None
    if final.exists():
        replaced = _aside(folder, iteration, "replaced")
        os.rename(final, replaced)
    os.rename(temporary, final)
    files.fsync_directory(folder)
    files.write_text(folder / POINTER, final.name + "\n")
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def clean(folder: pathlib.Path) -> None:
    """Remove what killed saves left behind, and nothing that a live one owns. Failures are no reason to stop a training."""
    for path in folder.glob(".iter_*"):
        match = UNFINISHED.fullmatch(path.name)
        if not match:
            continue
        if match[2] == "replaced" and not (folder / folder_name(int(match[1]))).exists():
            os.rename(path, folder / folder_name(int(match[1])))
        elif match[2] != "saving" or not _owned(path):
            shutil.rmtree(path, ignore_errors=True)


def retain(
    folder: pathlib.Path,
    current: int,
    keep_last: int,
    keep_every: int | None,
    ours: Callable[[pathlib.Path], bool] = lambda path: True,
) -> None:
    """Delete what the policy does not keep, see `expired`, of what is `ours`. Damaged checkpoints are left for their owner to look at."""
    complete = [number for number, path in _checkpoints(folder).items() if not manifest.glance(path) and ours(path)]
    for number in expired(complete, current, keep_last, keep_every):
        doomed = _aside(folder, number, "removing")
        os.rename(folder / folder_name(number), doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def expired(complete: list[int], current: int, keep_last: int, keep_every: int | None) -> list[int]:
    """The iterations to delete after `current` was saved.

    Kept: the last `keep_last` up to `current` (0: all) with `current` always among them, multiples of `keep_every`, and
    everything after `current`: that belongs to a continuation that this run went back on, and is replaced when reached.
    """
    if keep_last == 0:
        return []
    past = sorted(number for number in complete if number < current)
    old = past[: max(0, len(past) - (keep_last - 1))]
    return [number for number in old if not (keep_every and number % keep_every == 0)]


def _checkpoints(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """{iteration: path} of every folder of the right name, finished or waiting to be replaced, whatever is in it."""
    found: dict[int, pathlib.Path] = {}
    try:
        names = sorted(os.listdir(folder))  # `.iter...` sorts before `iter...`, which so wins
    except OSError:
        return found
    for name in names:
        match = FINISHED.fullmatch(name) or UNFINISHED.fullmatch(name)
        whole = match and (match.lastindex == 1 or match[2] == "replaced")
        if match and whole and (folder / name).is_dir():
            found[int(match[1])] = folder / name
    return found


def _aside(folder: pathlib.Path, iteration: int, state: str) -> pathlib.Path:
    return folder / f".{folder_name(iteration)}.{os.urandom(4).hex()}.{state}"


def _owned(path: pathlib.Path) -> bool:
    """Whether a live process writes this folder: it holds the lock, which dies with it however it dies."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return time.time() - path.stat().st_mtime < ABANDONED
    finally:
        os.close(descriptor)
