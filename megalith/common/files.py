"""Files that are either the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator


def fsync_directory(directory: str | os.PathLike) -> None:
    """Make a rename inside `directory` durable; without this a power cut can undo it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(target: pathlib.Path) -> pathlib.Path:
    """A unique path beside `target`, to write it under."""
    return target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def remove_leftovers(target: str | os.PathLike, notice: Callable[[str], None] = lambda line: None) -> None:
    """Remove what killed writers of `target` (a file, a folder, a dataset's prefix) left beside it.

    The lock of `target` must be held. Whoever holds it is the only writer, so that all others are dead. Their process
    numbers would not show it: another machine or container has its own.
    """
    target = pathlib.Path(target)
    _remove(target.parent, re.escape(target.name), notice)


def remove_leftovers_in(
    folder: str | os.PathLike, notice: Callable[[str], None] = lambda line: None, *, age: float = 0.0
) -> None:
    """As `remove_leftovers`, for all that is written into `folder`, which has no lock.

    age: only what was not written to for so many seconds.
    """
    _remove(pathlib.Path(folder), ".+", notice, age)


def _remove(folder: pathlib.Path, names: str, notice: Callable[[str], None], age: float = 0.0) -> None:
    left = re.compile(rf"\.{names}\.\d+\.[0-9a-f]{{8}}\.tmp(\.bin|\.idx)?")
    for path in [folder / name for name in os.listdir(folder) if left.fullmatch(name)]:
        with contextlib.suppress(FileNotFoundError):
            if age and time.time() - path.stat().st_mtime < age:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            notice(f"{path} is removed: a writer that was killed left it")


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike, ready: Callable[[], None] = lambda: None) -> Iterator[pathlib.Path]:
    """Yield a temporary path beside `target`; on success it is synced and renamed over `target`, else removed.

    ready: called before the rename; where it raises, `target` stays as it is.

    Two writers of one target have two temporary names. What a killed writer left is removed by `remove_leftovers`.
    """
    target = pathlib.Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        ready()
        os.replace(temporary, target)
        fsync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: str | os.PathLike, text: str) -> None:
    """Replace `target` by `text` (UTF-8), atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sampled_digest(path: str | os.PathLike, blocks: int) -> str:
    """Hexadecimal SHA-256 of a file's size and of `blocks` blocks of 4 KiB, evenly spread from the first to the last.

    It shows whether a large file is unchanged, at the cost of a few small reads; a change between the blocks is missed.
    """
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb", buffering=0) as file:
        for number in range(blocks):
            file.seek(max(0, size - 4096) * number // (blocks - 1))
            digest.update(file.read(4096))
    return digest.hexdigest()


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
