"""Pointer files: what git LFS and git-annex check out where the content of a file was not fetched."""

from __future__ import annotations

import os
import re

from megalith.common.errors import DataError

LFS = re.compile(rb"version https://(git-lfs\.github\.com|hawser\.github\.com)/spec/.*\n(?:.*\n)*?size (\d+)", re.ASCII)
ANNEX = re.compile(rb"/annex/objects/\S+\n?\Z")
LONGEST = 1024  # bytes; git LFS's own limit for a pointer


def pointer(path: str | os.PathLike) -> str:
    """What is at `path` instead of the file, and how to fetch it; "" where it is no pointer. Never raises."""
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > LONGEST:
            return ""
        with open(path, "rb") as file:
            head = file.read(LONGEST)
    except OSError:
        return ""
    if found := LFS.match(head):
        name, size = os.path.basename(path), f"{int(found[2]):,} bytes"
        text = f"this is a git LFS pointer to a file of {size}, not the file."
        return f"{text} Fetch it: git lfs pull --include '{name}'"
    if ANNEX.match(head):
        return f"this is a git-annex pointer, not the file. Fetch it: git annex get '{os.path.basename(path)}'"
    return ""


def refuse_pointer(path: str | os.PathLike) -> None:
    """Raise DataError where the file is only a pointer."""
    if found := pointer(path):
        raise DataError(f"{os.fspath(path)}: {found}")


def pointers_below(folder: str | os.PathLike[str]) -> list[str]:
    """The pointers at `folder` (a file or a folder), sorted: `path: what it is`."""
    paths = [os.path.join(base, name) for base, _, names in os.walk(os.fspath(folder)) for name in names] or [
        os.fspath(folder)
    ]
    return [f"{path}: {text}" for path in sorted(paths) if (text := pointer(path))]
