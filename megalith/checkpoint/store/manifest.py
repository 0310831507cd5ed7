"""manifest.json: which tensors and files a checkpoint holds, and the checksums that prove it. No torch.

    {"format": "megalith checkpoint", "schema": 1, "iteration": 100, "written_by": {...},
     "tensors": {name: {"shape": [2, 3], "dtype": "float32"}},
     "files": {file: {"bytes": 1234, "sha256": "..."}},
     "sha256": "of all the above"}

A folder without a manifest is no checkpoint: the manifest is written last, and the folder gets its name after that.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
from typing import Any

from megalith.common import files
from megalith.common.errors import CheckpointError
from megalith.common.pointers import pointer

NAME = "manifest.json"
FORMAT = "megalith checkpoint"
SCHEMA = 1  # raised when a reader of the older schema could not read what is written now
THREADS = min(8, os.cpu_count() or 1)  # hashing releases the GIL, so threads help where there are several files


def write(folder: pathlib.Path, content: dict[str, Any]) -> None:
    """Write `content` into `folder`, durably; format, schema and the checksum of all (sha256) are added."""
    content = {"format": FORMAT, "schema": SCHEMA, **content}
    files.write_text(folder / NAME, json.dumps({**content, "sha256": _checksum(content)}, indent=1) + "\n")


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`.

    Raises CheckpointError where it is missing, damaged, or of a schema newer than this program.
    """
    file = pathlib.Path(path) / NAME
    try:
        content = json.loads(file.read_bytes())
        stated = content.pop("sha256")
        schema = content["schema"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing: {path} is not a checkpoint of megalith, or an incomplete one"
        ) from None
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{file} is damaged: it cannot be read as a manifest ({type(error).__name__}: {error})"
        ) from None
    if stated != _checksum(content):
        raise CheckpointError(f"{file} is damaged: its content does not have the checksum that it states")
    if schema > SCHEMA:
        writer = content.get("written_by", {}).get("megalith", "(unknown)")
        raise CheckpointError(
            f"{file} has schema {schema}, written by megalith {writer}; this version reads schemas 1 to {SCHEMA}. "
            f"Install a newer megalith to read it."
        )
    return content


def verify(path: str | os.PathLike, *, part: tuple[int, int] = (0, 1)) -> list[str]:
    """Read every file of the checkpoint at `path` and compare its checksum; return the problems, one line a file.

    part: (i, n) reads every n-th file from the i-th on, so that n ranks can divide the work.
    """
    try:
        content = read(path)
    except CheckpointError as error:
        return [str(error)]
    selected = dict(sorted(content["files"].items())[part[0] :: part[1]])
    return compare(pathlib.Path(path), selected)


def check_sizes(path: str | os.PathLike) -> list[str]:
    """As `verify`, but only the presence and sizes of the files are compared, which takes milliseconds."""
    try:
        content = read(path)
    except CheckpointError as error:
        return [str(error)]
    return [
        text
        for name, facts in content["files"].items()
        if (text := _size_problem(pathlib.Path(path) / name, facts["bytes"]))
    ]


def compare(folder: pathlib.Path, expected: dict[str, dict]) -> list[str]:
    """The problems of the files of `folder` named in `expected` ({file: {"bytes", "sha256"}}), several read at once."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return [text for text in pool.map(lambda item: _problem(folder / item[0], item[1]), expected.items()) if text]


def _problem(file: pathlib.Path, facts: dict) -> str:
    wrong = _size_problem(file, facts["bytes"])
    if wrong:
        return wrong
    try:
        found = files.sha256(file)
    except OSError as error:
        return f"{file} is damaged: it cannot be read ({error.strerror})"
    stated = facts["sha256"]
    return (
        ""
        if found == stated
        else f"{file} is damaged: its SHA-256 is {found[:12]}..., the manifest says {stated[:12]}..."
    )


def _size_problem(file: pathlib.Path, size: int) -> str:
    try:
        found = file.stat().st_size
    except OSError:
        return f"{file} is missing"
    if found != size and (in_its_place := pointer(file)):
        return f"{file}: {in_its_place}"
    return "" if found == size else f"{file} is damaged: it has {found} bytes, the manifest says {size}"


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
