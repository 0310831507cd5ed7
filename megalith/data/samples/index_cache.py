"""Built indices stored as .npy files, named by a hash of all that they depend on, so that nothing stale can be read.

No locks: a builder writes to a temporary file and renames it, and two builders of one key write the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from megalith.common.files import atomic_path, remove_leftovers_in

ABANDONED_AFTER = 24 * 3600.0  # seconds after which a temporary file is taken for a killed writer's
Layout = Sequence[tuple[str, tuple[int, ...], np.dtype | type]]  # name, shape (-1: any), dtype of each array


def cache_key(*parts: object) -> str:
    """A hash over arrays (by dtype and content) and anything with a stable repr."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            for begin in range(0, part.size, 1 << 20):
                digest.update(part[begin : begin + (1 << 20)].tobytes())
        else:
            digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def default_folders(
    prefix: str | os.PathLike, chosen: str | os.PathLike | None = None, run: str | os.PathLike | None = None
) -> list[pathlib.Path]:
    """Where indices of the data at `prefix` may be, best first.

    That is the chosen folder, else one beside the data; that of the run; a temporary one.
    """
    first = pathlib.Path(chosen) if chosen else pathlib.Path(prefix).absolute().parent / "index-cache"
    private = pathlib.Path(tempfile.gettempdir()) / f"megalith-index-cache-{os.getuid()}"
    return [first, *([pathlib.Path(run) / "index-cache"] if run else []), private]


def load_or_build(
    key: str, layout: Layout, build: Callable[[], Sequence[np.ndarray]], folders: Sequence[str | os.PathLike]
) -> list[np.ndarray]:
    """The arrays of `layout`: memory-mapped from the first folder that has them, else built, stored and mapped.

    A file of the wrong shape (an older format, a full disk) counts as absent. Where no folder can be written to, the
    arrays stay in memory.
    """
    if (found := load_built(key, layout, folders)) is not None:
        return found
    arrays = build()
    for folder in folders:
        try:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            remove_leftovers_in(folder, age=ABANDONED_AFTER)
            for (name, _, _), array in zip(layout, arrays):
                path = pathlib.Path(folder) / f"{key}-{name}.npy"
                with atomic_path(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, array, allow_pickle=False)
            return _load(pathlib.Path(folder), key, layout)
        except (OSError, ValueError) as error:
            warnings.warn(f"index cache {folder} cannot be used ({error}); trying the next one", stacklevel=2)
    return list(arrays)


def load_built(key: str, layout: Layout, folders: Sequence[str | os.PathLike]) -> list[np.ndarray] | None:
    """The arrays of `layout`, memory-mapped from the first folder that has them; None where none has."""
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, EOFError):
            return _load(pathlib.Path(folder), key, layout)
    return None


def _load(folder: pathlib.Path, key: str, layout: Layout) -> list[np.ndarray]:
    """The arrays as np.ndarray views of their maps (np.memmap itself costs a microsecond an access)."""
    arrays = []
    for name, shape, kind in layout:
        array = np.load(folder / f"{key}-{name}.npy", mmap_mode="r", allow_pickle=False)
        if (
            array.ndim != len(shape)
            or any(a != b for a, b in zip(array.shape, shape) if b != -1)
            or array.dtype != kind
        ):
            raise ValueError(f"{key}-{name}.npy holds {array.dtype} {array.shape}, not {kind} {shape}")
        arrays.append(array.view(np.ndarray))
    return arrays
