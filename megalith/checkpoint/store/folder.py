"""A folder of checkpoints: `iter_0000100/` and others, and the text file `latest`, which names the one to resume from.

What is not finished has another name, so that a reader never sees half a checkpoint, whenever a process is killed:

    .iter_0000100.<random>.saving      being written, locked by its writer; stale when nobody holds the lock
    .iter_0000100.<random>.replaced    the old one while a new one of its number replaces it; valid until then
    .iter_0000100.<random>.removing    being deleted

No torch.
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
FOREIGN_FILES = (  # what lies in checkpoints of other programs
    "latest_checkpointed_iteration.txt", "mp_rank_*", "iter_*/mp_rank_*", "release/mp_rank_*", "global_step*",
    "config.json", "*.safetensors", "pytorch_model*.bin", "metadata.json", "iter_*/metadata.json",
)  # fmt: skip
CONVERSION_FILES = (  # what a conversion writes into its folder
    "iter_*", "release", POINTER, "latest_checkpointed_iteration.txt", "config.json", "generation_config.json",
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "tokenizer*", "vocab*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "*.model", "*.jinja", "adapter_config.json",
)  # fmt: skip
WRITTEN_LAST = (
    POINTER,
    "latest_checkpointed_iteration.txt",
    "config.json",
    "adapter_config.json",
)  # these mark a folder as complete
ABANDONED_SECONDS = 24 * 3600.0  # after which a writer is taken for dead on a filesystem without locks


def check_new(folder: pathlib.Path) -> None:
    """Raise CheckpointError where a conversion's folder exists and is not empty, or is not a folder."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder, and a converted checkpoint is written into one. Name a new folder."
        )
    if os.path.lexists(folder) and _content(folder):
        raise CheckpointError(
            f"{folder} exists and is not empty; a converted checkpoint goes into a new folder. "
            f"Name another one, or add --overwrite."
        )


@contextlib.contextmanager
def new_folder(
    folder: str | os.PathLike,
    *,
    inputs: Sequence[str | os.PathLike] = (),
    overwrite: bool = False,
    notice: Callable[[str], None] = lambda line: None,
) -> Iterator[pathlib.Path]:
    """Yield a temporary folder whose content is moved into `folder` when the block ends, and removed where it fails.

    overwrite: replace an earlier conversion, and nothing else. Raises LockedError while another process writes
    `folder`, CheckpointError where it holds something that is not replaced, or where it holds one of `inputs` or lies
    in it.
    """
    folder = pathlib.Path(os.path.realpath(folder))
    if not folder.is_dir():
        check_new(folder)
    with locked(folder, inside=True, notice=notice) as still_held:  # the lock that a run takes on its folders
        new, old = folder / "new", folder / "old"
        for path in (new, old):
            files.remove_leftovers(path, notice)
        _check_target(folder, inputs, overwrite)
        new, old = files.temporary_path(new), files.temporary_path(old)
        try:
            for path in (new, old):
                path.mkdir()
            yield new
            still_held()
            _move(folder, _content(folder), old)
            _move(new, sorted(os.listdir(new), key=lambda name: name in WRITTEN_LAST), folder)
            files.fsync_directory(folder)
        finally:
            for path in (new, old):
                shutil.rmtree(path, ignore_errors=True)


def _check_target(folder: pathlib.Path, inputs: Sequence[str | os.PathLike], overwrite: bool) -> None:
    for source in map(pathlib.Path, map(os.path.realpath, inputs)):
        if source == folder or (_content(folder) and (folder in source.parents or source in folder.parents)):
            rule = f"must lie apart from the source {source}, as what is read is never written over"
            raise CheckpointError(problem("The target folder", str(folder), rule, "Name a new folder"))
    if not overwrite:
        check_new(folder)
    others = [name for name in _content(folder) if not _is_conversion_file(name)]
    if others:
        rule = "holds files that no conversion writes, and --overwrite replaces an earlier conversion alone"
        raise CheckpointError(
            problem(f"{folder}", sorted(others)[:5], rule, "Name another folder, or move away what it holds")
        )


def _is_conversion_file(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in CONVERSION_FILES)


def _content(folder: pathlib.Path) -> list[str]:
    """The names in a folder, without those of a lock and of what is being written; [] where there is no folder."""
    names = os.listdir(folder) if folder.is_dir() else []
    return [name for name in names if not name.startswith((".lock", ".new.", ".old."))]


def _move(source: pathlib.Path, names: Sequence[str], target: pathlib.Path) -> None:
    for name in names:
        os.rename(source / name, target / name)


def folder_name(iteration: int) -> str:
    """100 -> iter_0000100, as Megatron names them."""
    return f"iter_{iteration:07d}"


def iteration_of(path: pathlib.Path) -> int:
    """iter_0000100 -> 100, whether it is finished or about to be replaced."""
    match = FINISHED.fullmatch(path.name) or UNFINISHED.fullmatch(path.name)
    if match is None:
        raise AssertionError(f"{path} does not have the name of a checkpoint")
    return int(match[1])


def iterations(folder: str | os.PathLike) -> list[int]:
    """The iterations that have a checkpoint in `folder`, ascending; [] where there is none, or no folder."""
    return sorted(number for number, path in _checkpoints(root(folder)).items() if (path / manifest.NAME).exists())


def is_megalith(folder: str | os.PathLike) -> bool:
    """Whether `folder` is a checkpoint of megalith, or holds one."""
    return (pathlib.Path(folder) / manifest.NAME).exists() or bool(iterations(folder))


def checkpoint_paths(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The folders of all checkpoints in `folder`, in the order of iterations, damaged ones among them."""
    return [path for _, path in sorted(_checkpoints(root(folder)).items())]


def latest(folder: str | os.PathLike) -> int | None:
    """The iteration that training resumes from: what `latest` names, or the newest where that file is missing.

    None where there is no checkpoint. It may be damaged: `find` checks that.
    """
    try:
        text = (root(folder) / POINTER).read_text(encoding="utf-8").strip()
    except OSError:
        return max(iterations(folder), default=None)
    match = FINISHED.fullmatch(text)
    if not match:
        if hint := describe_foreign(folder):
            raise CheckpointError(hint)
        raise CheckpointError(
            f"{root(folder) / POINTER} must hold the name of a checkpoint such as {folder_name(100)}; "
            f"found {text[:40]!r}. {describe_newest_good(folder)}"
        )
    return int(match[1])


def find(folder: str | os.PathLike, iteration: int | None = None) -> pathlib.Path:
    """The path of a checkpoint: that of `iteration`, or the one that `latest` names.

    folder: a folder of checkpoints, a run's folder that holds `checkpoints/`, or one checkpoint itself.
    Raises CheckpointError where it is missing, or where a file of it is missing or has a wrong size, and names the
    newest good one. (Checksums are compared by `load` and `verify`: to read all files here would double the time of a
    start.)
    """
    given = pathlib.Path(folder)
    if (given / manifest.NAME).exists() and iteration is None:
        path = given
    else:
        wanted = latest(folder) if iteration is None else iteration
        if wanted is None:
            if hint := describe_foreign(folder) or describe_runs(folder):
                raise CheckpointError(hint)
            raise CheckpointError(
                f"{given}: no checkpoint found; it would be a folder such as {folder_name(100)} in it. Check the path."
            )
        found = _checkpoints(root(folder)).get(wanted)
        if found is None:
            missing = root(folder) / folder_name(wanted)
            raise CheckpointError(f"{missing} is missing. {describe_newest_good(folder, wanted)}")
        path = found
    problems = manifest.check_sizes(path)
    if problems:
        raise CheckpointError(describe_damage(path, problems))
    return path


def describe_foreign(folder: str | os.PathLike) -> str:
    """The message for a folder (or file) with a checkpoint of another program; "" where there is none."""
    path = pathlib.Path(folder)
    found = [path] if path.is_file() else [file for name in FOREIGN_FILES for file in sorted(path.glob(name))[:1]]
    if not found:
        return ""
    return (
        f"{path} belongs to a checkpoint of another program ({found[0].name}); checkpoints of megalith are folders "
        f"such as {folder_name(100)}. Write megalith checkpoint import {path} FOLDER, and name that folder instead."
    )


def describe_runs(folder: str | os.PathLike) -> str:
    """A sentence that names the folders in `folder` that hold checkpoints, newest first; "" where there are none."""
    path, most = pathlib.Path(folder), 8
    runs = [run for run in path.iterdir() if run.is_dir() and iterations(run)] if path.is_dir() else []
    if not runs:
        return ""
    runs.sort(key=lambda run: root(run).stat().st_mtime, reverse=True)
    named = ", ".join(f"{run} (step {max(iterations(run))})" for run in runs[:most])
    more = f" and {len(runs) - most} more" * (len(runs) > most)
    return f"{path} is a folder of runs; name one of them: {named}{more}."


def describe_damage(path: pathlib.Path, problems: list[str]) -> str:
    """The message for a damaged checkpoint at `path`: the files, and the newest good one beside it."""
    number = FINISHED.fullmatch(path.name)
    return "\n".join([*problems, describe_newest_good(path.parent, int(number[1]) if number else None)])


def describe_newest_good(folder: str | os.PathLike, other_than: int | None = None) -> str:
    """A sentence that names the newest good checkpoint of `folder`; the checksums of every candidate are compared."""
    for number, path in sorted(_checkpoints(root(folder)).items(), reverse=True):
        if number != other_than and not manifest.verify(path):
            return f"The newest good checkpoint beside it is of iteration {number}: load it with --ckpt-step {number}."
    return "There is no other good checkpoint beside it."


def root(folder: str | os.PathLike) -> pathlib.Path:
    """The folder that holds the checkpoints: `folder`, or `folder`/checkpoints where it is a run's folder."""
    folder = pathlib.Path(folder)
    inner = folder / "checkpoints"
    return inner if inner.is_dir() and not (folder / POINTER).exists() else folder


def checkpoint_folder(config: RunConfig) -> pathlib.Path:
    """The folder of the run's checkpoints."""
    return pathlib.Path(config.checkpoint.save or f"{config.run_folder}/checkpoints")


def load_path(config: RunConfig) -> str | None:
    """--load, or None where it is the run's own folder.

    Scripts name one folder for --load and --save, and mean "resume, if there is a checkpoint".
    """
    load = config.checkpoint.load
    return None if load is not None and root(load).resolve() == checkpoint_folder(config).resolve() else load


def claim(folder: pathlib.Path, iteration: int) -> tuple[pathlib.Path, int]:
    """Make a `.saving` folder and lock it; returns it and the descriptor that holds the lock while it is open."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _temporary_path(folder, iteration, "saving")
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass  # a filesystem without locks: there age decides, see ABANDONED_SECONDS
    return path, descriptor


def publish(temporary: pathlib.Path, iteration: int) -> pathlib.Path:
    """Give a complete, synced `.saving` folder its final name, then write that into `latest`. Returns the new path."""
    folder = temporary.parent
    final = folder / folder_name(iteration)
    replaced = None
    if final.exists():
        replaced = _temporary_path(folder, iteration, "replaced")
        os.rename(final, replaced)
    os.rename(temporary, final)
    files.fsync_directory(folder)
    files.write_text(folder / POINTER, final.name + "\n")
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def clean(folder: pathlib.Path) -> None:
    """Remove what killed saves left behind, and nothing that a running save has locked.

    Callers ignore an OSError: it is no reason to stop a training.
    """
    for path in folder.glob(".iter_*"):
        match = UNFINISHED.fullmatch(path.name)
        if not match:
            continue
        if match[2] == "replaced" and not (folder / folder_name(int(match[1]))).exists():
            os.rename(path, folder / folder_name(int(match[1])))
        elif match[2] != "saving" or not _is_locked(path):
            shutil.rmtree(path, ignore_errors=True)


def prune(
    folder: pathlib.Path,
    current: int,
    keep_last: int,
    keep_every: int | None,
    deletable: Callable[[pathlib.Path], bool] = lambda path: True,
) -> None:
    """Delete the checkpoints that are not kept, see `expired`, of those that are `deletable`.

    Damaged checkpoints are left, so that the user can examine them.
    """
    found = _checkpoints(folder).items()
    complete = [number for number, path in found if not manifest.check_sizes(path) and deletable(path)]
    for number in expired(complete, current, keep_last, keep_every):
        doomed = _temporary_path(folder, number, "removing")
        os.rename(folder / folder_name(number), doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def expired(complete: list[int], current: int, keep_last: int, keep_every: int | None) -> list[int]:
    """The iterations to delete after `current` was saved.

    Kept: the last `keep_last` up to `current` (0: all) with `current` always among them, multiples of `keep_every`, and
    everything after `current`: this run went back behind those, and replaces them when it reaches their steps.
    """
    if keep_last == 0:
        return []
    past = sorted(number for number in complete if number < current)
    old = past[: max(0, len(past) - (keep_last - 1))]
    return [number for number in old if not (keep_every and number % keep_every == 0)]


def _checkpoints(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """{iteration: path} of every folder of the right name, finished or about to be replaced, whatever is in it."""
    found: dict[int, pathlib.Path] = {}
    try:
        names = sorted(os.listdir(folder))  # `.iter...` sorts before `iter...`, which so overrides it
    except OSError:
        return found
    for name in names:
        match = FINISHED.fullmatch(name) or UNFINISHED.fullmatch(name)
        complete = match and (match.lastindex == 1 or match[2] == "replaced")
        if match and complete and (folder / name).is_dir():
            found[int(match[1])] = folder / name
    return found


def _temporary_path(folder: pathlib.Path, iteration: int, state: str) -> pathlib.Path:
    return folder / f".{folder_name(iteration)}.{os.urandom(4).hex()}.{state}"


def _is_locked(path: pathlib.Path) -> bool:
    """Whether a live process writes this folder: it holds the lock, which the system releases however it ends."""
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
        return time.time() - path.stat().st_mtime < ABANDONED_SECONDS
    finally:
        os.close(descriptor)
