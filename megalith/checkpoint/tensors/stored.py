"""Where the bytes of a tensor are in a file of torch.save, and how to read only those."""

from __future__ import annotations

import io
import math
import mmap
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megalith.checkpoint.tensors.lazy import Index, Lazy
from megalith.common.errors import CheckpointError

DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "Untyped": torch.uint8, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip


@dataclass(frozen=True)
class Window:
    """A range of bytes of a file: all of it, a member of an uncompressed archive, or a slice of a shared file."""

    path: pathlib.Path
    start: int
    size: int
    name: str = ""  # shown instead of the path
    # An object that must live as long as the file, such as a temporary folder.
    keep_alive: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, path: pathlib.Path) -> Window:
        """All of a file."""
        try:
            return cls(path, 0, path.stat().st_size)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    def __str__(self) -> str:
        return self.name or str(self.path)

    def within(self, start: int, size: int) -> Window:
        """A range of this range."""
        if start < 0 or size < 0 or start + size > self.size:
            raise CheckpointError(
                f"{self} is damaged: bytes {start} to {start + size} are asked for, and it has {self.size}. "
                f"Copy it again."
            )
        return Window(self.path, self.start + start, size, str(self), self.keep_alive)

    def open(self) -> BinaryIO:
        """A seekable file of these bytes."""
        return io.BufferedReader(_WindowFile(self))  # type: ignore[return-value]

    def read(self, start: int, size: int) -> Tensor:
        """Some of the bytes, uint8 [size]."""
        part = self.within(start, size)
        data = torch.empty(size, dtype=torch.uint8)
        try:
            with open(self.path, "rb") as file:
                file.seek(part.start)
                count = file.readinto(memoryview(data.numpy())) if size else 0
        except OSError as error:
            raise CheckpointError(f"{self} cannot be read: {error}") from None
        if count != size:
            raise CheckpointError(f"{self} ends too early: {count} of {size} bytes at {part.start}. Copy it again.")
        return data

    def map(self, start: int, size: int) -> Tensor:
        """As `read`, but a private map of the file: bytes are read when touched, and the system can free the memory."""
        part = self.within(start, size)
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        before = part.start % mmap.ALLOCATIONGRANULARITY
        try:
            with open(self.path, "rb") as file:
                pages = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=part.start - before)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self} ends too early, or cannot be read: {error}. Copy it again.") from None
        return torch.frombuffer(pages, dtype=torch.uint8, offset=before, count=size)


class _WindowFile(io.RawIOBase):
    def __init__(self, window: Window):
        self.window, self.position = window, 0
        self.file = open(window.path, "rb")  # noqa: SIM115 (closed by close)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, self.window.size)[whence])
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self.window.size - self.position))
        self.file.seek(self.window.start + self.position)
        count = self.file.readinto(memoryview(buffer)[:size])
        self.position += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


@dataclass
class Records:
    """The records of one file: {name or key: (start, size)}, and the tensors that point into them."""

    window: Window
    locations: dict[str, tuple[int, int]] = field(default_factory=dict)
    tensors: list[tuple[str, int, int]] = field(default_factory=list)  # key, first byte, number of bytes
    widths: dict[str, int] = field(default_factory=dict)  # bytes of an element by key

    def map(self, key: str, start: int, size: int) -> Tensor:
        """Bytes of a record, see Window.map."""
        offset, length = self.locations[key]
        return self.window.within(offset, length).map(start, size)

    def check(self) -> None:
        """Every tensor must lie inside its record: raise CheckpointError otherwise."""
        for key, start, size in self.tensors:
            if key not in self.locations or start + size > self.locations[key][1]:
                raise CheckpointError(
                    f"{self.window} is damaged: a tensor points past the end of its data (record {key}). Copy it again."
                )


@dataclass(frozen=True)
class Storage:
    """A storage of a file: its element type, and the record that holds its bytes, once that is known."""

    dtype: torch.dtype
    records: Records | None = None
    key: str = ""
    first: int = 0

    @classmethod
    def of_class(cls, name: str) -> Storage:
        """The storage of a class of torch, such as FloatStorage."""
        if name.removesuffix("Storage") not in DTYPES:
            raise pickle.UnpicklingError(f"{name} is an unknown type of storage")
        return cls(DTYPES[name.removesuffix("Storage")])

    def at(self, records: Records, key: Any, view: Any) -> Storage:
        """The storage with this key; view: (key, offset, size) of a part of it, in files before torch 1.6."""
        records.widths[str(key)] = self.dtype.itemsize
        return Storage(self.dtype, records, str(key), int(view[1]) if view else 0)


def rebuild(storage: Any, offset: int, size: Any, stride: Any, *rest: Any, dtype: torch.dtype | None = None) -> Lazy:
    """The tensor that torch's `_rebuild_tensor` functions build, read when asked for."""
    size, stride = tuple(size), tuple(stride)
    natural = all(type(number) is int and number >= 0 for number in (offset, *size, *stride))
    valid = natural and len(size) == len(stride)
    if not (isinstance(storage, Storage) and storage.records is not None and valid):
        raise pickle.UnpicklingError("a tensor has no data, or negative sizes")
    records, key, kind = storage.records, storage.key, dtype or storage.dtype
    if not isinstance(kind, torch.dtype):
        raise pickle.UnpicklingError("a tensor has no type")
    numel = math.prod(size)
    span = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if numel else 0
    if numel > span:
        raise pickle.UnpicklingError("a tensor has more elements than data")
    start, count = (storage.first + offset) * kind.itemsize, span * kind.itemsize
    records.tensors.append((key, start, count))

    def read(index: Index = ()) -> Tensor:
        width = kind.itemsize  # a tensor may begin at any byte, so it is sliced as bytes
        part = records.map(key, start, count).as_strided((*size, width), (*(step * width for step in stride), 1))[index]
        part = part.contiguous() if part.data_ptr() % width == 0 else part.clone(memory_format=torch.contiguous_format)
        return part.view(kind).squeeze(-1)

    return Lazy(shape=size, dtype=kind, read=read, box=read)


def zip_records(window: Window, file: BinaryIO) -> Records:
    """The records of a zip of torch >= 1.6: data.pkl under its name, storages under their keys."""
    records = Records(window)
    for name, (start, size) in uncompressed_members(window, file).items():
        inner = name.partition("/")[2]
        if inner == "byteorder" and bytes(window.read(start, size).numpy()) != b"little":
            raise pickle.UnpicklingError("it was written on a big-endian machine")
        records.locations[inner.removeprefix("data/")] = (start, size)
    return records


def uncompressed_members(window: Window, file: BinaryIO) -> Mapping[str, tuple[int, int]]:
    """{name: (first byte, size)} of the uncompressed members of a zip."""
    found = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.compress_type == zipfile.ZIP_STORED:
                header = bytes(window.read(info.header_offset, 30).numpy())
                # The lengths of name and extra field, which may differ from those in the zip's directory.
                skip = sum(struct.unpack("<26xHH", header))
                found[info.filename] = (info.header_offset + 30 + skip, info.file_size)
    return found


def legacy_records(records: Records, keys: Any, file: BinaryIO) -> None:
    """Find the storages behind the pickles of a file before torch 1.6: for each its length as int64, then its data."""
    position = file.tell()
    for key in map(str, keys):
        (count,) = struct.unpack("<q", bytes(records.window.read(position, 8).numpy()))
        records.locations[key] = (position + 8, count * records.widths[key])
        position += 8 + count * records.widths[key]
