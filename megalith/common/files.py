"""Files that are either the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator


def fsync_directory(directory: str | os.PathLike) -> None:
    """Make a rename inside `directory` durable; without this a power cut can undo it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def aside(target: pathlib.Path) -> pathlib.Path:
    """A name beside `target` that nobody else has, under which it is written."""
    return target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def sweep(target: str | os.PathLike, notice: Callable[[str], None] = lambda line: None) -> None:
    """Remove what killed writers of `target` (a file, a folder, a dataset's prefix) left beside it. Its lock must be held.

    Whoever holds the lock is the only writer, so all others are dead; their process numbers would not tell: another machine
    or container has its own.
    """
    target = pathlib.Path(target)
    left = re.compile(rf"\.{re.escape(target.name)}\.\d+\.[0-9a-f]{{8}}\.tmp(\.bin|\.idx)?")
    for path in [target.with_name(name) for name in os.listdir(target.parent) if left.fullmatch(name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        notice(f"{path} is removed: a writer that was killed left it")


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Give a temporary path beside `target`; on success it is synced and renamed over `target`, else removed.

    Two writers of one target have two temporary names. What a killed writer left is removed by `sweep`.
    """
    target = pathlib.Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = aside(target)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
        fsync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: str | os.PathLike, text: str) -> None:
    """Replace `target` by `text` (UTF-8), atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
