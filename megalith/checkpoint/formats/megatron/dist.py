"""Megatron core's `torch_dist` checkpoints: full tensors in PyTorch's distributed format, with Megatron's names.

Layers are stacked in one tensor, of which a single layer can be read.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megalith.checkpoint.formats import Format, TorchDistOptions
from megalith.checkpoint.formats.huggingface.files import read_json
from megalith.checkpoint.formats.megatron import build
from megalith.checkpoint.formats.megatron.agreement import iteration_notes
from megalith.checkpoint.formats.megatron.assemble import WEIGHTS_ONLY_CURE
from megalith.checkpoint.formats.megatron.names import normalize_names
from megalith.checkpoint.formats.megatron.optimizer import MOMENTS
from megalith.checkpoint.formats.megatron.replicas import Replicas
from megalith.checkpoint.formats.megatron.source import TRACKER
from megalith.checkpoint.tensors import unpickle
from megalith.checkpoint.tensors.chunked import INDEX, DcpFolder
from megalith.checkpoint.tensors.lazy import Lazy, cat
from megalith.checkpoint.tensors.stored import Window
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, problem
from megalith.config.flags.text import Words

METADATA_FILE = "metadata.json"
STATE_NAMES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "fp32_param": "master", "param": "master"}
STATE_KEY = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")


def named_tensors(chunked: DcpFolder, key: str, name: str) -> Iterator[tuple[str, Lazy]]:
    """(Megatron's name, tensor) of a key; for stacked layers one of each layer.

    name: the key without the prefix that says which state of the optimizer it is.
    """
    original = unpickle.fields((chunked.facts.get("mcore_data") or {}).get(key)).get(
        "nd_reformulated_orig_global_shape"
    )
    if not re.search(r"\.layers\.(?!\d)", name):
        tensor = chunked.lazy(key)
        yield name, tensor if original is None else _unflatten(tensor, original)
        return
    for number in range((original or chunked.tensors[key].shape)[0]):
        yield name.replace(".layers.", f".layers.{number}.", 1), _layer(chunked, key, number, original)


def _layer(chunked: DcpFolder, key: str, number: int, original: Sequence[int] | None) -> Lazy:
    """One of stacked layers, read alone. original: the shape of the stack, where it was stored flat."""
    shape = chunked.tensors[key].shape
    if original is None:
        return chunked.lazy(key, (number, *[0] * (len(shape) - 1)), (1, *shape[1:])).reshape(shape[1:])
    layers = original[0] // shape[0]  # of a fragment, one after another
    size = shape[-1] // layers
    first = (number // layers, *[0] * (len(shape) - 2), number % layers * size)
    return _unflatten(chunked.lazy(key, first, (1, *shape[1:-1], size)), (1, *original[1:])).reshape(original[1:])


def _unflatten(flat: Lazy, shape: Sequence[int]) -> Lazy:
    """A tensor whose fragments the distributed optimizer stored flat, with the full `shape`.

    flat: [fragments of the first dimension, ..., fragments of the last dimension, elements of a fragment].
    """
    fragments = flat.shape[:-1]
    local = [size // count for size, count in zip(shape, fragments, strict=True)]

    def concatenated(*index: int) -> Lazy:
        """All fragments whose index begins with these numbers."""
        if len(index) == len(fragments):
            return flat.at(tuple(slice(number, number + 1) for number in index)).reshape(local)
        return cat([concatenated(*index, number) for number in range(fragments[len(index)])], len(index))

    return concatenated()


def find(path: pathlib.Path, iteration: int | None) -> pathlib.Path | None:
    """The directory with the index: `path` or a directory in it, of the requested iteration or the tracker's."""
    if (path / INDEX).exists() and iteration is None:
        return path
    tracker = path / TRACKER
    number = str(iteration) if iteration is not None else tracker.read_text().strip() if tracker.exists() else ""
    inner = path / (f"iter_{int(number):07d}" if number.isdigit() else "release")
    return inner if (inner / INDEX).exists() else None


def recognises(path: pathlib.Path) -> bool:
    """Whether `path` holds such a directory."""
    folder = find(path, None) if path.is_dir() else None
    return folder is not None and (folder / METADATA_FILE).exists()


def read(path: pathlib.Path, options: TorchDistOptions) -> Weights:
    """The weights at `path`. Raises CheckpointError for what is missing, damaged, unknown or does not fit."""
    folder = find(path, options.iteration)
    if folder is None:
        found = Words("nothing") if options.iteration is None else options.iteration
        rule = f"must name an iteration whose folder in {path} holds {INDEX}"
        raise CheckpointError(problem("--ckpt-step", found, rule, "Check --ckpt-step"))
    if (folder / METADATA_FILE).exists():
        backend = read_json(folder / METADATA_FILE).get("sharded_backend")
        if backend != "torch_dist":
            what, rule = f"sharded_backend in {folder / METADATA_FILE}", "must be torch_dist, which alone can be read"
            cure = "Save it once more with --ckpt-format torch_dist"
            raise CheckpointError(problem(what, backend, rule, cure))
    classes: set[str] = set()
    chunked = DcpFolder(folder)
    classes.update(name for name in chunked.classes if not name.endswith("MCoreMetadata"))
    keys = [key for key in chunked.tensors if "optimizer." not in key and not key.startswith("rerun_state_machine")]
    model = [pair for key in keys for pair in named_tensors(chunked, key, key.removeprefix("model."))]
    content = common_state(folder, chunked, classes)
    names = normalize_names(name for name, _ in model).values()
    tensors = {name: tensor for name, (_, tensor) in zip(names, model, strict=True)}
    notes = iteration_notes(folder.name, content)
    return build.build_weights(
        content,
        3.0,
        [tensors],
        lambda notes: optimizer_states(folder, chunked),
        classes,
        options,
        Replicas(options.replicas),
        notes,
    )


def common_state(folder: pathlib.Path, chunked: DcpFolder, classes: set[str]) -> dict[str, Any]:
    """The content without tensors: common.pt, or in newer versions an entry of the index."""
    windows = [Window.of(folder / "common.pt")] if (folder / "common.pt").exists() else []
    windows += [window for key, window in chunked.blobs.items() if key.startswith("common_state")]
    content: dict[str, Any] = {}
    for window in windows:
        value, found = unpickle.load(window)
        classes.update(found)
        for part in value if isinstance(value, list) else [value]:
            content |= part if isinstance(part, dict) else {}
    return content


def optimizer_states(folder: pathlib.Path, chunked: DcpFolder) -> build.OptimizerStates:
    """{"exp_avg", "exp_avg_sq", "master": [tensors]} of the optimizer."""
    found: dict[str, dict[str, Lazy]] = {}
    for key in chunked.tensors:
        match = STATE_KEY.fullmatch(key)
        if match and match[1] in STATE_NAMES:
            found.setdefault(STATE_NAMES[match[1]], {}).update(
                named_tensors(chunked, key, match[2].removeprefix("model.").removeprefix("module."))
            )
    if not all(key in found for key in MOMENTS):
        flat = any("gbuf_idx" in key for key in chunked.tensors)
        rule = "must be saved, but the checkpoint was saved without it"
        if flat:
            rule = (
                "must not be stored as flat buffers, which depend on settings that are not stored (save with "
                "--dist-ckpt-optim-fully-reshardable)"
            )
        what, stored = f"The optimizer in {folder}", Words("flat buffers" if flat else "nothing")
        raise CheckpointError(problem(what, stored, rule, WEIGHTS_ONLY_CURE))
    return {
        key: [dict(zip(normalize_names(table).values(), table.values(), strict=True))] for key, table in found.items()
    }


FORMAT = Format(
    "torch_dist: Megatron core's folders of .metadata, metadata.json and .distcp files",
    recognises,
    TorchDistOptions,
    read,
)
