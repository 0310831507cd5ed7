"""Tensors to files and back through torch.distributed.checkpoint: its plans, its file format, our checksums.

What is written is an ordinary DCP folder, so that `torch.distributed.checkpoint.load` reads it without megalith.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import threading
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.tensors.lazy import Index, Lazy
from megalith.common.errors import CheckpointError

THREADS = 2  # files a rank writes at once: while one waits for the disk, the other copies and hashes
ALIGNED = 64  # bytes: what torch aligns data to within its files, and this what it writes within ours
DATA = ".distcp"


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without its history."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write(
    state: dict[str, Tensor], parts: Mapping[str, Tensor], folder: pathlib.Path, ranks: Ranks
) -> tuple[dict, dict]:
    """Write tensors into `folder`, all ranks together, durably.

    state: says what is written: names, and layouts. parts: {name: this rank's part}, the data, asked for one by one; they
        may be copies on another device (see saver.py) or read when asked for (see editing.py).
    Returns ({name: {"shape", "dtype"}} of the whole checkpoint, {file: {"bytes", "sha256"}} of this rank's files).
    """
    planner = _SavePlanner(parts)
    writer = _Writer(folder)
    planner.set_up_planner(state, is_coordinator=ranks.rank == 0)
    writer.set_up_storage_writer(ranks.rank == 0)
    plans: list[SavePlan] = []

    def meet(offers: list[tuple[SavePlan, dict]]) -> set[MetadataIndex]:
        plans.extend(plan for plan, _ in offers)
        return _copies(offers)

    holders = {name: _members(tensor) for name, tensor in state.items()}
    copies = ranks.collect(lambda: (writer.prepare_local_plan(planner.create_local_plan()), holders), meet)
    if copies:
        mine = {item.index for item in planner.plan.items} & copies
        ranks.collect(lambda: {index: fingerprint(parts[index.fqn]) for index in mine}, _same)
    plan = planner.finish_plan(
        ranks.distribute(lambda: None, lambda _: writer.prepare_global_plan(planner.create_global_plan(plans)[0]))
    )

    def finish(results: list) -> dict:
        writer.finish(planner.metadata, results)
        tensors: dict[str, Any] = planner.metadata.state_dict_metadata
        return {name: _facts(found.size, found.properties.dtype) for name, found in tensors.items()}

    tensors = ranks.collect(lambda: writer.write(plan, planner), finish)
    return tensors, writer.sums


def fill(tensors: Mapping[str, Lazy], state: Mapping[str, Tensor]) -> None:
    """Fill the tensors of `state` in place, plain ones and DTensors of any layout: this rank's parts, no communication.

    Names and shapes must fit (see fit.py); dtypes are converted. Of the source no more is read than these parts.
    """
    with torch.no_grad():
        for name, tensor in state.items():
            mine = local(tensor)
            if mine.numel():  # of few rows some ranks have none
                mine.copy_(tensors[name].part(box(tensor)))


def box(tensor: Tensor) -> Index:
    """Where this rank's part lies in the whole."""
    (mine,) = _create_chunk_list(tensor)
    return tuple(slice(first, first + size) for first, size in zip(mine.offsets, mine.sizes, strict=True))


def fingerprint(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes: equal for equal tensors, on whatever device."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class _SavePlanner(DefaultSavePlanner):
    """DCP's planner, which takes the data from `parts` and only the layout from the state."""

    def __init__(self, parts: Mapping[str, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.parts[index.fqn]


class _Writer(FileSystemWriter):
    """DCP's writer, which hashes what it writes."""

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder, thread_count=THREADS, sync_files=True)
        self.fs = self.files = _Files()

    @property
    def sums(self) -> dict[str, dict]:
        """{file: {"bytes", "sha256"}} of what this rank wrote."""
        return self.files.sums

    def storage_meta(self) -> None:
        """Leave out what DCP would record: the temporary path of the folder."""

    def write(self, plan: SavePlan, planner: DefaultSavePlanner) -> list[WriteResult]:
        """The files of this rank, THREADS at once, a tensor at a time in each (`write_data` keeps all tensors of a file until its end)."""
        largest = max(map(_size, plan.items), default=0)
        alone = threading.Lock()  # the embedding and the head: one of them is in memory, not both

        def fill(number: int, items: list[WriteItem]) -> list[WriteResult]:
            name = f"{plan.storage_data.prefix}{number}{DATA}"
            with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
                results = []
                for item in items:
                    with alone if _size(item) == largest else contextlib.nullcontext():
                        results.append(_write_item(stream, item, planner.resolve_data(item), name))
                os.fsync(stream.fileno())
            return results

        with ThreadPoolExecutor(THREADS) as pool:
            return [result for results in pool.map(fill, range(THREADS), _split(plan.items)) for result in results]


def _write_item(stream: _Hashed, item: WriteItem, tensor: Tensor, name: str) -> WriteResult:
    """A tensor as torch.save writes it, where its data can be mapped from the file."""
    tensor = tensor.detach().cpu()
    if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone(memory_format=torch.contiguous_format)  # torch.save writes a storage, not a view
    stream.write(bytes(-stream.size % ALIGNED))
    first = stream.size
    torch.save(tensor, stream)
    length = stream.size - first
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, first, length))


def _size(item: WriteItem) -> int:
    """Bytes of a tensor."""
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _split(items: list[WriteItem]) -> list[list[WriteItem]]:
    """Items in order, each into the file that has the least so far: neighbours are written at about the same time."""
    files: list[list[WriteItem]] = [[] for _ in range(THREADS)]
    held = [0] * THREADS
    for item in items:
        least = held.index(min(held))
        files[least].append(item)
        held[least] += _size(item)
    return files


class _Files(FileSystem):
    """DCP's file system, which keeps the checksum of every file it writes."""

    def __init__(self) -> None:
        self.sums: dict[str, dict] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        name = pathlib.Path(path).name
        with open(path, mode) as file:
            stream = _Hashed(file)
            try:
                yield stream
            except Exception as error:
                raise stream.failure or error from None
        self.sums[name] = {"bytes": stream.size, "sha256": stream.hash.hexdigest()}

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.sums[pathlib.Path(new_path).name] = self.sums.pop(pathlib.Path(path).name)


class _Hashed:
    """A file open for writing from its beginning to its end, with the hash of all that went in."""

    def __init__(self, file: Any):
        self.file, self.size, self.hash = file, 0, hashlib.sha256()
        self.failure: OSError | None = None  # torch.save replaces "disk full" by words of its own

    def write(self, data: Any) -> int:
        try:
            count = self.file.write(data)
        except OSError as error:
            error.filename = self.file.name
            self.failure = error
            raise
        self.hash.update(data)
        self.size += count
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _members(tensor: Tensor) -> tuple[int, ...] | None:
    """The ranks of a DTensor's mesh; None for a plain tensor."""
    return tuple(tensor.device_mesh.mesh.flatten().tolist()) if isinstance(tensor, DTensor) else None


def _copies(offers: list[tuple[SavePlan, dict]]) -> set[MetadataIndex]:
    """The pieces that several ranks hold independently of each other, whose equality is to be checked.

    Those are plain tensors, and DTensors of different meshes (tied weights of two pipeline stages). Replicas within one
    mesh are DTensor's own promise; hashing them all would cost as much as writing them.
    Raises CheckpointError where ranks disagree on a tensor's shape or dtype.
    """
    facts: dict[str, dict] = {}
    holder: dict[MetadataIndex, Any] = {}
    found = set()
    for plan, holders in offers:
        for item in plan.items:
            if item.tensor_data is None:
                raise CheckpointError(f"{item.index.fqn}: a checkpoint holds tensors; numbers belong into train_state")
            mine = _facts(item.tensor_data.size, item.tensor_data.properties.dtype)
            if facts.setdefault(item.index.fqn, mine) != mine:
                raise CheckpointError(
                    f"{item.index.fqn}: two ranks disagree on it: {facts[item.index.fqn]} and {mine}. Nothing was saved."
                )
            mesh = holders[item.index.fqn]
            if item.index in holder and (mesh is None or holder[item.index] != mesh):
                found.add(item.index)
            holder.setdefault(item.index, mesh)
    return found


def _same(prints: list[dict[MetadataIndex, int]]) -> None:
    """Raise CheckpointError where the same piece differs between ranks."""
    seen: dict[MetadataIndex, tuple[int, int]] = {}
    for rank, mine in enumerate(prints):
        for index, value in mine.items():
            other, expected = seen.setdefault(index, (rank, value))
            if value != expected:
                raise CheckpointError(
                    f"{index.fqn}: ranks {other} and {rank} hold copies that differ; saving one would hide it. Nothing was saved. "
                    f"A replicated tensor is updated alike everywhere: look for a missing all-reduce or a rank-dependent input."
                )


def _facts(size: torch.Size, dtype: torch.dtype) -> dict:
    return {"shape": list(size), "dtype": str(dtype).removeprefix("torch.")}
