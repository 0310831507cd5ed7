"""Folders of numpy arrays in numbered parts, mapped into memory, and JSON beside them. No pickle.

    NAME.json           the description: what decides on every part; written first, compared when work is resumed
    00003.ARRAY.npy     an array of part 3
    00003.json          facts of part 3 and checksums of its arrays: written last, so that a part with it is complete

What a part holds follows from the description alone, so that any number of processes, and a run that is resumed, write
the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.common.files import atomic_path, sha256, write_text
from megalith.config.flags.text import Words, value_text

Folder = str | os.PathLike
BUILD_AGAIN = "delete the .json of its part and give the command that wrote it again"


def begin(
    path: pathlib.Path, description: Mapping[str, Any], parts: int, names: Sequence[str], cure: str,
    notice: Callable[[str], None],
) -> list[int]:  # fmt: skip
    """Write the description `path` of a folder, or compare it where work is resumed; the parts that are to be written.

    Those that are damaged are among them, after a notice: all bytes are read. names: of the arrays of a part. Raises
    DataError where the folder holds anything else, or was begun with another description; nothing is replaced.
    The lock of the folder must be held.
    """
    if path.exists():
        check_same(path.parent, read_json(path, cure), description, cure)
    else:
        write_description(path, description, cure)
    forget_damaged(path.parent, parts, names, notice)
    return missing(path.parent, parts)


def write_description(path: pathlib.Path, description: Mapping[str, Any], cure: str) -> None:
    """Write a description into a new folder. Raises DataError where the folder holds anything else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if found := sorted(each.name for each in path.parent.iterdir() if not each.name.startswith(".")):
        rule = "must be a new folder, or one whose building is resumed"
        raise DataError(problem(str(path.parent), Words(f"one with {found[0]}"), rule, cure))
    write_text(path, json.dumps(description, indent=1) + "\n")


def check_same(folder: Folder, then: Mapping[str, Any], now: Mapping[str, Any], cure: str) -> None:
    """Raise DataError that names the first value of `now` that is not as it was when the folder was begun."""
    for name, new in now.items():
        old = then.get(name)
        if json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):
            rule = f"must be built with one {name}, which was {value_text(old)} when it was begun"
            raise DataError(problem(str(folder), Words(value_text(new)), rule, cure))


def write_part(folder: Folder, part: int, arrays: Mapping[str, np.ndarray], **facts: Any) -> None:
    """Write a complete part."""
    folder, files = pathlib.Path(folder), dict[str, str]()
    for name, array in arrays.items():
        path = folder / f"{part:05d}.{name}.npy"
        with atomic_path(path) as temporary:
            with open(temporary, "wb") as file:
                np.save(file, array, allow_pickle=False)
            files[path.name] = sha256(temporary)
    write_text(folder / f"{part:05d}.json", json.dumps({**facts, "files": files}) + "\n")


def missing(folder: Folder, parts: int) -> list[int]:
    """The parts, of so many, that are still to be written."""
    return [part for part in range(parts) if not (pathlib.Path(folder) / f"{part:05d}.json").exists()]


def forget_damaged(folder: Folder, parts: int, names: Sequence[str], notice: Callable[[str], None]) -> None:
    """Count parts that are there and damaged as not written, so that they are written again."""
    for part, name, what in list(damaged(folder, parts, names)):
        facts = pathlib.Path(folder) / f"{part:05d}.json"
        if facts.exists():
            notice(f"{folder}/{name} {what}: part {part} is written again")
            facts.unlink()


def check_complete(folder: Folder, parts: int, what: str, command: str) -> None:
    """Raise DataError where parts (`what` they are called) are missing. command: that writes them."""
    if found := missing(folder, parts):
        text = Words(f"{len(found)} of {parts} missing, first {found[0]}")
        cure = f"Give the same {command} command again: what was finished is kept"
        raise DataError(problem(f"The {what} of {folder}", text, "must be complete", cure))


def read_json(path: pathlib.Path, cure: str) -> dict[str, Any]:
    """A description, or the facts of a part. Raises DataError where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}). {cure}.") from None
    return found


def digest(files: Iterable[Folder]) -> str:
    """What distinguishes the contents of these files, taken together, from others."""
    found = hashlib.sha256()
    for file in files:
        found.update(pathlib.Path(file).read_bytes())
    return found.hexdigest()[:16]


def open_array(folder: Folder, part: int, name: str, dtype: type, shape: tuple, description: str) -> np.ndarray:
    """An array of a part, mapped into memory. Raises DataError where it is not of this type and shape.

    description: the name of the file that says so.
    """
    path = pathlib.Path(folder) / f"{part:05d}.{name}.npy"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Copy it again, or {BUILD_AGAIN}.") from None
    if array.dtype != dtype or array.shape != shape:
        found = Words(f"{array.dtype} {array.shape}")
        rule = f"must hold {np.dtype(dtype).name} {shape}, as {description} says"
        raise DataError(problem(str(path), found, rule, f"Copy it again, or {BUILD_AGAIN}"))
    return array


def damaged(folder: Folder, parts: int, names: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """(part, file, what is wrong with it), after all bytes were read; nothing where all is undamaged.

    names: of the arrays of a part.
    """
    folder = pathlib.Path(folder)
    for part in range(parts):
        facts = folder / f"{part:05d}.json"
        try:
            found = dict(json.loads(facts.read_text(encoding="utf-8"))["files"])
        except FileNotFoundError:
            yield part, facts.name, "is missing: this part was never finished"
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield part, facts.name, f"cannot be read ({type(error).__name__}: {error})"
            continue
        for name in (f"{part:05d}.{array}.npy" for array in names):
            try:
                if sha256(folder / name) != found.get(name):
                    yield part, name, "has another checksum than when it was written"
            except OSError as error:
                yield part, name, f"cannot be read ({error.strerror})"
