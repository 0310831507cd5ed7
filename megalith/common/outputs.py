"""Files that a command writes: one writer at a time, never an input, nothing replaced unasked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from megalith.common.errors import DataError, problem
from megalith.common.files import remove_leftovers
from megalith.common.locks import locked

Path = str | os.PathLike


@contextlib.contextmanager
def writing(
    output: Path,
    files: Sequence[Path] | None = None,
    *,
    inputs: Sequence[Path] = (),
    overwrite: bool = False,
    flag: str = "--output",
    notice: Callable[[str], None] = lambda line: None,
) -> Iterator[Callable[[], None]]:
    """Hold the lock of `output` (a file, or what the names of `files` begin with) in the block that writes it.

    The block gets a check of the lock, see `locked`. What killed writers of the output left is removed.
    Raises LockedError while another process writes it, and what `check` raises.
    """
    with locked(output, notice=notice) as still_held:
        files = [output] if files is None else files
        check(files, inputs=inputs, overwrite=overwrite, flag=flag)
        for each in {os.fspath(output), *map(str, files)}:
            remove_leftovers(each, notice)
        yield still_held


def check(
    files: Sequence[Path], *, inputs: Sequence[Path] = (), overwrite: bool = False, flag: str = "--output"
) -> None:
    """Raise DataError where one of `files` is also an input (by any name or link), or exists without `overwrite`."""
    paths = {os.path.realpath(each): each for each in inputs}
    numbers = {(found.st_dev, found.st_ino): each for each in inputs if (found := _stat(each))}
    for file in [os.fspath(each) for each in files]:
        found = _stat(file)
        read = paths.get(os.path.realpath(file)) or (numbers.get((found.st_dev, found.st_ino)) if found else None)
        if read is not None:
            rule = f"must not be the input {os.fspath(read)} too, as what is read is never written over"
            raise DataError(problem(flag, file, rule, "Choose another output"))
        if os.path.lexists(file) and not os.path.isfile(file) and not os.path.islink(file):
            kind = "a folder" if os.path.isdir(file) else "no ordinary file"
            rule = f"must name a file to write, and this is {kind}"
            raise DataError(problem(flag, file, rule, "Choose another output"))
        if os.path.lexists(file) and not overwrite:
            cure = "Add --overwrite, or choose another output"
            raise DataError(f"{flag}: {file} exists, and nothing is replaced unasked. {cure}.")


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
