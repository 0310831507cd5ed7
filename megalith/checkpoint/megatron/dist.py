"""Megatron core's `torch_dist` checkpoints: whole tensors in PyTorch's distributed format, with Megatron's names.

The index and what is not a tensor are pickles, which are read without running them; of the data, the chunks asked for alone.
"""

from __future__ import annotations

import itertools
import json
import operator
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megalith.checkpoint import unpickle
from megalith.checkpoint.formats import Format, Options
from megalith.checkpoint.megatron import build
from megalith.checkpoint.megatron.names import normal_names
from megalith.checkpoint.megatron.optimizer import CURE, MOMENTS
from megalith.checkpoint.megatron.source import TRACKER
from megalith.checkpoint.stored import Window
from megalith.checkpoint.weights import Lazy, Weights
from megalith.common.errors import CheckpointError, problem

INDEX, KIND = ".metadata", "metadata.json"
STATES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "fp32_param": "master", "param": "master"}
STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")


class Chunked:
    """The tensors and bytes of one directory.

    tensors: {key: (shape, dtype, [(offsets, sizes, file)])}. blobs: {key: file} of what is not a tensor.
    """

    def __init__(self, folder: pathlib.Path, classes: set[str]):
        """Read the index. Raises CheckpointError for one that is damaged, asks for code, or names files that are not there."""
        index, found = unpickle.load(Window.of(folder / INDEX), plain=True)
        classes.update(name for name in found if not name.endswith("MCoreMetadata"))
        facts = unpickle.fields(index)
        self.originals: Mapping[str, Any] = facts.get("mcore_data") or {}
        places: dict[str, list[tuple[tuple[int, ...] | None, Window]]] = {}
        for key, info in (facts.get("storage_data") or {}).items():
            where, file = unpickle.fields(key), unpickle.fields(info)
            if file.get("transform_descriptors"):
                rule = "its data is compressed in a way that is not known here"
                raise CheckpointError(problem(str(folder / INDEX), file["transform_descriptors"], rule, "Save it uncompressed"))
            path = folder / pathlib.PurePath(str(file["relative_path"])).name  # a name, so that it leads nowhere else
            places.setdefault(where["fqn"], []).append((where.get("offset"), Window.of(path).within(file["offset"], file["length"])))
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype, list]] = {}
        self.blobs: dict[str, Window] = {}
        for name, facts_of in (facts.get("state_dict_metadata") or {}).items():
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
                    problem(f"{folder}: {name}", f"no data at {missing[0]}", "the index names all of it", "Copy it again")
                )
            self.tensors[name] = (tuple(about["size"]), _dtype(about["properties"]), [(*chunk, files[chunk[0]]) for chunk in chunks])

    def lazy(self, key: str, layer: int | None = None) -> Lazy:
        """A tensor; of one that stacks the layers, the one of `layer`."""
        shape, dtype, chunks = self.tensors[key]
        first, sizes = (0,) * len(shape), shape
        if layer is not None:
            first, sizes = (layer, *first[1:]), (1, *shape[1:])
        shown = sizes if layer is None else sizes[1:]
        return Lazy(shape=shown, dtype=dtype, read=lambda: _region(first, sizes, dtype, chunks).view(shown))

    def named(self, key: str, name: str) -> Iterator[tuple[str, Lazy]]:
        """(Megatron's name, tensor): of stacked layers one for each. `name` is the key without what says which state it is."""
        original = unpickle.fields(self.originals.get(key)).get("nd_reformulated_orig_global_shape")
        stacked = re.search(r"\.layers\.(?!\d)", name)
        if original is not None:
            whole = self.lazy(key).then(lambda flat: _restore(flat, tuple(original)))
            pieces = [whole.then(operator.itemgetter(i)) for i in range(whole.shape[0])] if stacked else [whole]
        else:
            pieces = [self.lazy(key, i) for i in range(self.tensors[key][0][0])] if stacked else [self.lazy(key)]
        for number, piece in enumerate(pieces):
            yield (name.replace(".layers.", f".layers.{number}.", 1) if stacked else name), piece


def _region(first: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype, chunks: list) -> Tensor:
    """A box of a tensor from the chunks that reach into it."""
    box = torch.empty(sizes, dtype=dtype)
    filled = 0
    for offsets, lengths, window in chunks:
        begin = [max(a, b) for a, b in zip(first, offsets, strict=True)]
        end = [min(a + n, b + m) for a, n, b, m in zip(first, sizes, offsets, lengths, strict=True)]
        if all(a < b for a, b in zip(begin, end, strict=True)):
            chunk, _ = unpickle.load(window)
            if not isinstance(chunk, Lazy) or chunk.shape != lengths:
                raise CheckpointError(f"{window}: at {window.start} is not the chunk that the index says. Copy it again.")
            part = chunk.read()[tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offsets, strict=True))]
            box[tuple(slice(a - f, b - f) for a, b, f in zip(begin, end, first, strict=True))] = part
            filled += part.numel()
    if filled != box.numel():
        raise CheckpointError(
            f"{len(chunks)} chunks of a tensor hold {filled} of {box.numel()} elements asked for. Copy the checkpoint again."
        )
    return box


def _restore(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor whose fragments the distributed optimizer stored flat: [fragments of each axis ..., elements] -> `shape`."""
    fragments = flat.shape[:-1]
    local = [size // count for size, count in zip(shape, fragments, strict=True)]
    axes = list(itertools.chain.from_iterable((axis, axis + len(shape)) for axis in range(len(shape))))
    return flat.reshape(*fragments, *local).permute(axes).reshape(shape)


def _dtype(properties: Any) -> torch.dtype:
    found = properties.state[0] if isinstance(properties.state, tuple) else unpickle.fields(properties).get("dtype")
    if not isinstance(found, torch.dtype):
        raise CheckpointError(problem("type of a tensor in the index", str(found), "it is one of torch's", "Copy the checkpoint again"))
    return found


def find(path: pathlib.Path, iteration: int | None) -> pathlib.Path | None:
    """The directory with the index: `path`, or the iteration in it that is asked for or that the tracker names."""
    if (path / INDEX).exists() and iteration is None:
        return path
    tracker = path / TRACKER
    number = str(iteration) if iteration is not None else tracker.read_text().strip() if tracker.exists() else ""
    inner = path / (f"iter_{int(number):07d}" if number.isdigit() else "release")
    return inner if (inner / INDEX).exists() else None


def recognises(path: pathlib.Path) -> bool:
    """Whether `path` holds such a directory."""
    folder = find(path, None) if path.is_dir() else None
    return folder is not None and (folder / KIND).exists()


def read(path: pathlib.Path, options: Options) -> Weights:
    """The weights at `path`. Raises CheckpointError for what is missing, damaged, unknown or does not fit."""
    folder = find(path, options.iteration)
    if folder is None:
        raise CheckpointError(
            problem(f"{path}", options.iteration, f"a folder with {INDEX} is there for each iteration", "Check --ckpt-step")
        )
    if (folder / KIND).exists():
        backend = json.loads((folder / KIND).read_text()).get("sharded_backend")
        if backend != "torch_dist":
            cure = "Save it once more with --ckpt-format torch_dist"
            raise CheckpointError(problem(f"{folder / KIND}, sharded_backend", backend, "torch_dist alone can be read", cure))
    classes: set[str] = set()
    chunked = Chunked(folder, classes)
    keys = [key for key in chunked.tensors if "optimizer." not in key and not key.startswith("rerun_state_machine")]
    model = [pair for key in keys for pair in chunked.named(key, key.removeprefix("model."))]
    content = common(folder, chunked, classes)
    parts = {normal: tensor for normal, (_, tensor) in zip(normal_names(name for name, _ in model).values(), model, strict=True)}
    return build.weights_of(content, 3.0, [parts], lambda notes: states(folder, chunked), classes, options)


def common(folder: pathlib.Path, chunked: Chunked, classes: set[str]) -> dict[str, Any]:
    """What is not a tensor: common.pt, or in newer versions an entry of the index."""
    windows = [Window.of(folder / "common.pt")] if (folder / "common.pt").exists() else []
    windows += [window for key, window in chunked.blobs.items() if key.startswith("common_state")]
    content: dict[str, Any] = {}
    for window in windows:
        value, found = unpickle.load(window)
        classes.update(found)
        for part in value if isinstance(value, list) else [value]:
            content |= part if isinstance(part, dict) else {}
    return content


def states(folder: pathlib.Path, chunked: Chunked) -> build.States:
    """{"exp_avg", "exp_avg_sq", "master": [tensors]} of the optimizer."""
    found: dict[str, dict[str, Lazy]] = {}
    for key in chunked.tensors:
        match = STATE.fullmatch(key)
        if match and match[1] in STATES:
            found.setdefault(STATES[match[1]], {}).update(chunked.named(key, match[2].removeprefix("model.").removeprefix("module.")))
    if not all(key in found for key in MOMENTS):
        flat = any("gbuf_idx" in key for key in chunked.tensors)
        rule = (
            "its flat buffers depend on settings that are not stored (save with --dist-ckpt-optim-fully-reshardable)"
            if flat else "it was saved without"
        )  # fmt: skip
        raise CheckpointError(problem(f"{folder}, optimizer", "flat buffers" if flat else None, rule, CURE))
    normal = {key: dict(zip(normal_names(table).values(), table.values(), strict=True)) for key, table in found.items()}
    return {key: [table] for key, table in normal.items()}


FORMAT = Format("torch_dist: Megatron core's folders of .metadata, metadata.json and .distcp files", recognises, read)
