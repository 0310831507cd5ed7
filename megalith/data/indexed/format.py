"""What reader and writer of indexed datasets share: header, dtype codes, and the files that a path means.

Needs numpy alone.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

import numpy as np

try:
    from megalith.common.errors import DataError
    from megalith.common.pointers import refuse_pointer
except ImportError:  # this package was copied out of megalith

    def refuse_pointer(path: str | os.PathLike) -> None:
        """Raise DataError where git LFS left a pointer in place of the file."""

    class DataError(ValueError):  # type: ignore[no-redef]
        """A dataset that cannot be read as what it claims to be."""


MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
BLOCK = 1 << 20  # sequences read at once: bounds the memory of every pass over an index
DTYPE_CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}


def best_dtype(vocabulary_size: int | None) -> type:
    """The dtype Megatron stores tokens of such a vocabulary in: uint16 below 65500, else int32."""
    return np.uint16 if vocabulary_size is not None and vocabulary_size < 65500 else np.int32


def dtype_of_code(code: int, float_codes: str | None, where: str) -> np.dtype:
    """The dtype of a code. 7 is float32 in Megatron core and float64 in Megatron before 2023: `float_codes` decides.

    where: the file and offset that a message names.
    """
    if code not in DTYPES:
        cause = "the codes are 1 to 8, so the file is damaged or not an indexed dataset"
        raise DataError(f"{where}: dtype code {code} is unknown; {cause}")
    if code == 7 and float_codes not in ("core", "legacy"):
        meanings = "float32 in files of Megatron core and float64 in files of before 2023"
        raise DataError(f'{where}: dtype code 7 is {meanings}; say which with float_codes="core" or "legacy"')
    return np.dtype(np.float64 if code == 7 and float_codes == "legacy" else DTYPES[code])


def dataset_files(prefixes: Iterable[str]) -> list[str]:
    """The two files of each dataset, by their prefixes."""
    return [prefix + suffix for prefix in prefixes for suffix in (".bin", ".idx")]


def is_folder(path: str | os.PathLike) -> bool:
    """Whether `path` means a folder of datasets: always with a slash at its end, else where no dataset has this prefix.

    Raises DataError where it may mean a dataset or a folder, because both exist.
    """
    path = os.fspath(path)
    if not os.path.isdir(path) or path.endswith(os.sep) or not any(map(os.path.isfile, dataset_files([path]))):
        return os.path.isdir(path)
    if any(name.endswith(".idx") for _, _, names in os.walk(path) for name in names):
        meanings = f"the dataset {path}.bin, {path}.idx, or the folder {path}{os.sep}, which holds datasets too"
        cure = f"Write {path}.bin for the dataset, {path}{os.sep} for the folder."
        raise DataError(f"{path} may mean two things: {meanings}. {cure}")
    return False


def resolve_prefix(path: str | os.PathLike) -> str:
    """The prefix meant by `path`, which may end in `.bin` or `.idx`. Raises DataError, which names misnamed files."""
    path = os.fspath(path)
    stem = path[:-4] if path.endswith((".bin", ".idx")) else path
    for prefix in dict.fromkeys((path, stem)):
        if os.path.isfile(prefix + ".idx") and os.path.isfile(prefix + ".bin"):
            return prefix
    if os.path.isfile(stem + ".bin.idx"):
        cure = f"Rename it: mv '{stem}.bin.idx' '{stem}.idx'"
        raise DataError(f"{stem}.bin.idx is misnamed; an index is called {stem}.idx. {cure}")
    for present, missing in ((".bin", ".idx"), (".idx", ".bin")):
        if os.path.isfile(stem + present):
            rule = "an indexed dataset is both files. Copy the other one too"
            raise DataError(f"{stem}{present} has no partner {stem}{missing}; {rule}")
    folder, name = os.path.split(stem)
    listed = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    names = [entry[:-4] for entry in listed if entry.endswith(".idx")]
    alike = [entry for entry in names if entry.replace("-", "_") == name.replace("-", "_")]
    near = alike or sorted(entry for entry in names if entry.startswith(name))[:3]
    hint = "Give the path without its extension."
    if near:
        hint = f"Did you mean {' or '.join(os.path.join(folder, entry) for entry in near)}?"
    raise DataError(f"no indexed dataset at {stem}: neither {stem}.bin nor {stem}.idx exists. {hint}")
