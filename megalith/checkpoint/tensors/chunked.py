"""Folders of torch.distributed.checkpoint, ours and Megatron core's, tensor by tensor and without running what is in them.

The index and what is not a tensor are pickles, which are read without running them; of the data, the chunks asked for alone.
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

INDEX = ".metadata"
Box = tuple[int, ...]


class Stored(NamedTuple):
    """A tensor of the folder. chunks: (first element on each axis, sizes, where)."""

    shape: Box
    dtype: torch.dtype
    chunks: list[tuple[Box, Box, Window]]


class Chunked:
    """The tensors and bytes of one folder.

    tensors: by name. blobs: {name: file} of what is not a tensor. facts: all that the index says. classes: of stand-ins in it.
    """

    def __init__(self, folder: pathlib.Path):
        """Read the index. Raises CheckpointError for one that is damaged, asks for code, or names files that are not there."""
        index, self.classes = unpickle.load(Window.of(folder / INDEX), plain=True)
        self.facts = unpickle.fields(index)
        places: dict[str, list[tuple[Box | None, Window]]] = {}
        for key, info in (self.facts.get("storage_data") or {}).items():
            where, file = unpickle.fields(key), unpickle.fields(info)
            if file.get("transform_descriptors"):
                rule = "its data is compressed in a way that is not known here"
                raise CheckpointError(
                    problem(str(folder / INDEX), file["transform_descriptors"], rule, "Save it uncompressed")
                )
            path = folder / pathlib.PurePath(str(file["relative_path"])).name  # a name, so that it leads nowhere else
            places.setdefault(where["fqn"], []).append(
                (where.get("offset"), Window.of(path).within(file["offset"], file["length"]))
            )
        self.tensors: dict[str, Stored] = {}
        self.blobs: dict[str, Window] = {}
        for name, facts_of in (self.facts.get("state_dict_metadata") or {}).items():
            about = unpickle.fields(facts_of)
            if "chunks" not in about:
                if name in places:
                    self.blobs[name] = places[name][0][1]
                continue
            files = dict(places.get(name, []))
            chunks = [(tuple(each["offsets"]), tuple(each["sizes"])) for each in map(unpickle.fields, about["chunks"])]
            missing = [offsets for offsets, _ in chunks if offsets not in files]
            if missing:
                raise CheckpointError(
                    problem(
                        f"{folder}: {name}", f"no data at {missing[0]}", "the index names all of it", "Copy it again"
                    )
                )
            self.tensors[name] = Stored(
                tuple(about["size"]), _dtype(about["properties"]), [(*chunk, files[chunk[0]]) for chunk in chunks]
            )

    def lazies(self) -> dict[str, Lazy]:
        """All tensors."""
        return {name: self.lazy(name) for name in self.tensors}

    def lazy(self, name: str, first: Box | None = None, sizes: Box | None = None) -> Lazy:
        """A tensor, or the box of it that begins at `first` and has these sizes."""
        shape, dtype, chunks = self.tensors[name]
        first, sizes = first or (0,) * len(shape), shape if sizes is None else sizes

        def read(index: Index = ()) -> Tensor:
            taken = ranges(sizes, index)
            begin = tuple(place + each.start for place, each in zip(first, taken, strict=True))
            return _region(begin, tuple(map(len, taken)), dtype, chunks)

        return Lazy(shape=sizes, dtype=dtype, read=read, box=read)


def _region(first: Box, sizes: Box, dtype: torch.dtype, chunks: list[tuple[Box, Box, Window]]) -> Tensor:
    """A box of a tensor from the chunks that reach into it; a part of one chunk is a map of its file."""
    box, filled = None, 0
    for offsets, lengths, window in chunks:
        begin = [max(a, b) for a, b in zip(first, offsets, strict=True)]
        end = [min(a + n, b + m) for a, n, b, m in zip(first, sizes, offsets, lengths, strict=True)]
        if all(a < b for a, b in zip(begin, end, strict=True)):
            chunk, _ = unpickle.load(window)
            if not isinstance(chunk, Lazy) or chunk.shape != lengths:
                raise CheckpointError(
                    f"{window}: at {window.start} is not the chunk that the index says. Copy it again."
                )
            part = chunk.part(tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offsets, strict=True)))
            if part.shape == sizes:
                return part
            box = torch.empty(sizes, dtype=dtype) if box is None else box
            box[tuple(slice(a - f, b - f) for a, b, f in zip(begin, end, first, strict=True))] = part
            filled += part.numel()
    if filled != math.prod(sizes):
        raise CheckpointError(
            f"{len(chunks)} chunks of a tensor hold {filled} of {math.prod(sizes)} elements asked for. Copy the checkpoint again."
        )
    return torch.empty(sizes, dtype=dtype) if box is None else box


def _dtype(properties: Any) -> torch.dtype:
    found = properties.state[0] if isinstance(properties.state, tuple) else unpickle.fields(properties).get("dtype")
    if not isinstance(found, torch.dtype):
        raise CheckpointError(
            problem("type of a tensor in the index", str(found), "it is one of torch's", "Copy the checkpoint again")
        )
    return found
