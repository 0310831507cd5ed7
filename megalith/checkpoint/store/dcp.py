"""Tensors to files and back through torch.distributed.checkpoint (DCP): its plans and format, megalith's checksums.

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
ALIGNMENT = 64  # bytes: torch aligns data to it within its files, and so must each of them be within a DCP file
DATA_SUFFIX = ".distcp"


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, detached from the autograd graph."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write(
    state: dict[str, Tensor], parts: Mapping[str, Tensor], folder: pathlib.Path, ranks: Ranks
) -> tuple[dict, dict]:
    """Write tensors into `folder`, all ranks together, durably.

    state: the names and layouts of what is written. parts: {name: this rank's part}, the data, read one by one; they
        may be copies on another device (see saver.py) or read when asked for (see editing.py).
    Returns ({name: {"shape", "dtype"}} of the whole checkpoint, {file: {"bytes", "sha256"}} of this rank's files).
    """
    planner = _SavePlanner(parts)
    writer = _Writer(folder)
    planner.set_up_planner(state, is_coordinator=ranks.rank == 0)
    writer.set_up_storage_writer(ranks.rank == 0)
    plans: list[SavePlan] = []

    def merge_plans(offers: list[tuple[SavePlan, dict]]) -> set[MetadataIndex]:
        plans.extend(plan for plan, _ in offers)
        return _find_copies(offers)

    meshes = {name: _mesh_ranks(tensor) for name, tensor in state.items()}
    copies = ranks.collect(lambda: (writer.prepare_local_plan(planner.create_local_plan()), meshes), merge_plans)
    if copies:
        local_copies = {item.index for item in planner.plan.items} & copies
        ranks.collect(lambda: {index: fingerprint(parts[index.fqn]) for index in local_copies}, _check_equal)
    plan = planner.finish_plan(
        ranks.distribute(lambda: None, lambda _: writer.prepare_global_plan(planner.create_global_plan(plans)[0]))
    )

    def finish(results: list) -> dict:
        writer.finish(planner.metadata, results)
        tensors: dict[str, Any] = planner.metadata.state_dict_metadata
        return {name: _tensor_facts(found.size, found.properties.dtype) for name, found in tensors.items()}

    tensors = ranks.collect(lambda: writer.write(plan, planner), finish)
    return tensors, writer.sums


def fill(tensors: Mapping[str, Lazy], state: Mapping[str, Tensor]) -> None:
    """Fill the tensors of `state` in place, DTensors of any layout among them: this rank's parts, no communication.

    Names and shapes must fit (see fit.py); dtypes are converted. Of the source no more is read than these parts.
    """
    with torch.no_grad():
        for name, tensor in state.items():
            target = local(tensor)
            if target.numel():  # a rank may have no row of a tensor that has fewer rows than there are ranks
                target.copy_(tensors[name].part(box(tensor)))


def box(tensor: Tensor) -> Index:
    """Where this rank's part lies in the whole tensor."""
    (chunk,) = _create_chunk_list(tensor)
    return tuple(slice(first, first + size) for first, size in zip(chunk.offsets, chunk.sizes, strict=True))


def fingerprint(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes: equal for equal tensors, on whatever device."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class _SavePlanner(DefaultSavePlanner):
    """DCP's planner, but it takes the data from `parts`, and only the layout from the state."""

    def __init__(self, parts: Mapping[str, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.parts[index.fqn]


class _Writer(FileSystemWriter):
    """DCP's writer, but it hashes what it writes."""

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder, thread_count=THREADS, sync_files=True)
        self.fs = self.files = _HashingFileSystem()

    @property
    def sums(self) -> dict[str, dict]:
        """{file: {"bytes", "sha256"}} of what this rank wrote."""
        return self.files.sums

    def storage_meta(self) -> None:
        """Leave out what DCP records here: the temporary path of the folder."""

    def write(self, plan: SavePlan, planner: DefaultSavePlanner) -> list[WriteResult]:
        """Write the files of this rank, THREADS at once, a tensor at a time in each.

        (DCP's `write_data` keeps all tensors of a file in memory until its end.)
        """
        largest = max(map(_size, plan.items), default=0)
        largest_lock = threading.Lock()  # of the embedding and the head only one is in memory at a time

        def fill(number: int, items: list[WriteItem]) -> list[WriteResult]:
            name = f"{plan.storage_data.prefix}{number}{DATA_SUFFIX}"
            with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
                results = []
                for item in items:
                    with largest_lock if _size(item) == largest else contextlib.nullcontext():
                        results.append(_write_item(stream, item, planner.resolve_data(item), name))
                os.fsync(stream.fileno())
            return results

        with ThreadPoolExecutor(THREADS) as pool:
            return [result for results in pool.map(fill, range(THREADS), _split(plan.items)) for result in results]


def _write_item(stream: _HashingFile, item: WriteItem, tensor: Tensor, name: str) -> WriteResult:
    """Write a tensor as torch.save does, at an offset from which its data can be mapped from the file."""
    tensor = tensor.detach().cpu()
    if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone(memory_format=torch.contiguous_format)  # torch.save writes a storage, not a view
    stream.write(bytes(-stream.size % ALIGNMENT))
    first = stream.size
    torch.save(tensor, stream)
    length = stream.size - first
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, first, length))


def _size(item: WriteItem) -> int:
    """Bytes of a tensor."""
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _split(items: list[WriteItem]) -> list[list[WriteItem]]:
    """Items in order, each into the file that is smallest so far: neighbours are written at about the same time."""
    files: list[list[WriteItem]] = [[] for _ in range(THREADS)]
    sizes = [0] * THREADS
    for item in items:
        smallest = sizes.index(min(sizes))
        files[smallest].append(item)
        sizes[smallest] += _size(item)
    return files


class _HashingFileSystem(FileSystem):
    """DCP's file system, but it keeps the checksum of every file it writes."""

    def __init__(self) -> None:
        self.sums: dict[str, dict] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        name = pathlib.Path(path).name
        with open(path, mode) as file:
            stream = _HashingFile(file)
            try:
                yield stream
            except Exception as error:
                raise stream.failure or error from None
        self.sums[name] = {"bytes": stream.size, "sha256": stream.hash.hexdigest()}

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.sums[pathlib.Path(new_path).name] = self.sums.pop(pathlib.Path(path).name)


class _HashingFile:
    """A file open for writing from its beginning to its end, with the hash of all that was written."""

    def __init__(self, file: Any):
        self.file, self.size, self.hash = file, 0, hashlib.sha256()
        self.failure: OSError | None = None  # torch.save replaces "disk full" by a message that does not say so

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


def _mesh_ranks(tensor: Tensor) -> tuple[int, ...] | None:
    """The ranks of a DTensor's mesh; None for a tensor that is not distributed."""
    return tuple(tensor.device_mesh.mesh.flatten().tolist()) if isinstance(tensor, DTensor) else None


def _find_copies(offers: list[tuple[SavePlan, dict]]) -> set[MetadataIndex]:
    """The pieces that several ranks hold independently of each other, whose equality is to be checked.

    Those are tensors that are not DTensors, and DTensors of different meshes (tied weights of two pipeline stages).
    DTensor guarantees that replicas within one mesh are equal; hashing them all would cost as much as writing them.
    Raises CheckpointError where ranks disagree on a tensor's shape or dtype.
    """
    facts: dict[str, dict] = {}
    first_mesh: dict[MetadataIndex, Any] = {}
    copies = set()
    for plan, meshes in offers:
        for item in plan.items:
            name = item.index.fqn
            if item.tensor_data is None:
                raise CheckpointError(f"{name} is not a tensor; a checkpoint holds tensors. Put it into train_state")
            found = _tensor_facts(item.tensor_data.size, item.tensor_data.properties.dtype)
            if facts.setdefault(name, found) != found:
                raise CheckpointError(
                    f"{name} differs between two ranks: it is {facts[name]} on one and {found} on the other. "
                    f"Nothing was saved."
                )
            mesh = meshes[name]
            if item.index in first_mesh and (mesh is None or first_mesh[item.index] != mesh):
                copies.add(item.index)
            first_mesh.setdefault(item.index, mesh)
    return copies


def _check_equal(fingerprints: list[dict[MetadataIndex, int]]) -> None:
    """Raise CheckpointError where the same piece differs between ranks."""
    seen: dict[MetadataIndex, tuple[int, int]] = {}
    for rank, of_rank in enumerate(fingerprints):
        for index, value in of_rank.items():
            other, expected = seen.setdefault(index, (rank, value))
            if value != expected:
                raise CheckpointError(
                    f"ranks {other} and {rank} hold copies that differ of {index.fqn}; saving one of them would hide "
                    f"that. Nothing was saved. A replicated tensor is updated alike on all ranks: look for a missing "
                    f"all-reduce or an input that depends on the rank."
                )


def _tensor_facts(size: torch.Size, dtype: torch.dtype) -> dict:
    return {"shape": list(size), "dtype": str(dtype).removeprefix("torch.")}
