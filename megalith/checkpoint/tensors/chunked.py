"""Folders of torch.distributed.checkpoint (DCP), megalith's and Megatron core's, read tensor by tensor.

The index and what is not a tensor are pickles, which are read without running them; of the data, only the chunks asked
for are read.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalith.checkpoint.tensors import unpickle
from megalith.checkpoint.tensors.lazy import Index, Lazy, ranges
from megalith.checkpoint.tensors.stored import Window
from megalith.common.errors import CheckpointError, problem
from megalith.config.flags.text import Words

INDEX = ".metadata"
IntTuple = tuple[int, ...]


class StoredTensor(NamedTuple):
    """A tensor of the folder. chunks: (first element on each axis, sizes, bytes of the file)."""

    shape: IntTuple
    dtype: torch.dtype
    chunks: list[tuple[IntTuple, IntTuple, Window]]


class DcpFolder:
    """The tensors and bytes of one folder.

    tensors: by name. blobs: {name: file} of what is not a tensor. facts: all that the index says.
    classes: the names of the classes in it that stand-ins replace.
    """

    def __init__(self, folder: pathlib.Path):
        """Read the index. Raises CheckpointError where it is damaged, asks for code, or names missing files."""
        index, self.classes = unpickle.load(Window.of(folder / INDEX), bare_pickle=True)
        self.facts = unpickle.fields(index)
        chunk_files: dict[str, list[tuple[IntTuple | None, Window]]] = {}
        for key, info in (self.facts.get("storage_data") or {}).items():
            where, file = unpickle.fields(key), unpickle.fields(info)
            if file.get("transform_descriptors"):
                rule = "has data that is compressed in a way that megalith does not read"
                raise CheckpointError(
                    problem(str(folder / INDEX), file["transform_descriptors"], rule, "Save it uncompressed")
                )
            path = folder / pathlib.PurePath(str(file["relative_path"])).name  # the name alone: never another folder
            chunk_files.setdefault(where["fqn"], []).append(
                (where.get("offset"), Window.of(path).within(file["offset"], file["length"]))
            )
        self.tensors: dict[str, StoredTensor] = {}
        self.blobs: dict[str, Window] = {}
        for name, facts_of in (self.facts.get("state_dict_metadata") or {}).items():
            about = unpickle.fields(facts_of)
            if "chunks" not in about:
                if name in chunk_files:
                    self.blobs[name] = chunk_files[name][0][1]
                continue
            files = dict(chunk_files.get(name, []))
            chunks = [
                (tuple(chunk["offsets"]), tuple(chunk["sizes"])) for chunk in map(unpickle.fields, about["chunks"])
            ]
            missing = [offsets for offsets, _ in chunks if offsets not in files]
            if missing:
                rule = "must have data for every chunk that the index lists"
                found = Words(f"none for the chunk at {missing[0]}")
                raise CheckpointError(problem(f"{name} in {folder}", found, rule, "Copy it again"))
            self.tensors[name] = StoredTensor(
                tuple(about["size"]), _dtype(about["properties"]), [(*chunk, files[chunk[0]]) for chunk in chunks]
            )

    def lazies(self) -> dict[str, Lazy]:
        """All tensors, by name."""
        return {name: self.lazy(name) for name in self.tensors}

    def lazy(self, name: str, first: IntTuple | None = None, sizes: IntTuple | None = None) -> Lazy:
        """A tensor, or the box of it that begins at `first` and has these sizes."""
        shape, dtype, chunks = self.tensors[name]
        first, sizes = first or (0,) * len(shape), shape if sizes is None else sizes

        def read(index: Index = ()) -> Tensor:
            selected = ranges(sizes, index)
            begin = tuple(offset + axis.start for offset, axis in zip(first, selected, strict=True))
            return _read_box(begin, tuple(map(len, selected)), dtype, chunks)

        return Lazy(shape=sizes, dtype=dtype, read=read, box=read)


def _read_box(
    first: IntTuple, sizes: IntTuple, dtype: torch.dtype, chunks: list[tuple[IntTuple, IntTuple, Window]]
) -> Tensor:
    """A box of a tensor from the chunks that overlap it; a box that lies in one chunk is a map of its file."""
    box, filled = None, 0
    for offsets, lengths, window in chunks:
        begin = [max(a, b) for a, b in zip(first, offsets, strict=True)]
        end = [min(a + n, b + m) for a, n, b, m in zip(first, sizes, offsets, lengths, strict=True)]
        if all(a < b for a, b in zip(begin, end, strict=True)):
            chunk, _ = unpickle.load(window)
            if not isinstance(chunk, Lazy) or chunk.shape != lengths:
                raise CheckpointError(
                    f"{window} does not have, at byte {window.start}, the chunk that the index lists. Copy it again."
                )
            part = chunk.part(tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offsets, strict=True)))
            if part.shape == sizes:
                return part
            box = torch.empty(sizes, dtype=dtype) if box is None else box
            box[tuple(slice(a - f, b - f) for a, b, f in zip(begin, end, first, strict=True))] = part
            filled += part.numel()
    if filled != math.prod(sizes):
        raise CheckpointError(
            f"the {len(chunks)} chunks of a tensor hold {filled} of {math.prod(sizes)} elements asked for. "
            f"Copy the checkpoint again."
        )
    return torch.empty(sizes, dtype=dtype) if box is None else box


def _dtype(properties: Any) -> torch.dtype:
    found = properties.state[0] if isinstance(properties.state, tuple) else unpickle.fields(properties).get("dtype")
    if not isinstance(found, torch.dtype):
        what, rule = "the type of a tensor in the index", "must be a torch.dtype"
        raise CheckpointError(problem(what, str(found), rule, "Copy the checkpoint again"))
    return found
