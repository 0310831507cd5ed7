"""Megatron core's `torch_dist` checkpoints: whole tensors in PyTorch's distributed format, with Megatron's names.

Layers are stacked in one tensor; a layer is read alone.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megalith.checkpoint.formats import Format, Options
from megalith.checkpoint.formats.huggingface.files import read_json
from megalith.checkpoint.formats.megatron import build
from megalith.checkpoint.formats.megatron.agreement import same_iteration
from megalith.checkpoint.formats.megatron.assemble import WEIGHTS_ALONE
from megalith.checkpoint.formats.megatron.names import normal_names
from megalith.checkpoint.formats.megatron.optimizer import MOMENTS
from megalith.checkpoint.formats.megatron.replicas import Replicas
from megalith.checkpoint.formats.megatron.source import TRACKER
from megalith.checkpoint.tensors import unpickle
from megalith.checkpoint.tensors.chunked import INDEX, Chunked
from megalith.checkpoint.tensors.lazy import Lazy, cat
from megalith.checkpoint.tensors.stored import Window
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, problem

KIND = "metadata.json"
STATES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "fp32_param": "master", "param": "master"}
STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")


def named(chunked: Chunked, key: str, name: str) -> Iterator[tuple[str, Lazy]]:
    """(Megatron's name, tensor): of stacked layers one for each. `name` is the key without what says which state it is."""
    original = unpickle.fields((chunked.facts.get("mcore_data") or {}).get(key)).get(
        "nd_reformulated_orig_global_shape"
    )
    if not re.search(r"\.layers\.(?!\d)", name):
        whole = chunked.lazy(key)
        yield name, whole if original is None else _restore(whole, original)
        return
    for number in range((original or chunked.tensors[key].shape)[0]):
        yield name.replace(".layers.", f".layers.{number}.", 1), _layer(chunked, key, number, original)


def _layer(chunked: Chunked, key: str, number: int, original: Sequence[int] | None) -> Lazy:
    """One of stacked layers, and no more of the file. original: the shape of the stack, where it was stored flat."""
    shape = chunked.tensors[key].shape
    if original is None:
        return chunked.lazy(key, (number, *[0] * (len(shape) - 1)), (1, *shape[1:])).reshape(shape[1:])
    each = original[0] // shape[0]  # layers of a fragment, one after another
    size = shape[-1] // each
    first = (number // each, *[0] * (len(shape) - 2), number % each * size)
    return _restore(chunked.lazy(key, first, (1, *shape[1:-1], size)), (1, *original[1:])).reshape(original[1:])


def _restore(flat: Lazy, shape: Sequence[int]) -> Lazy:
    """A tensor whose fragments the distributed optimizer stored flat: [fragments of each axis ..., elements] -> `shape`."""
    fragments = flat.shape[:-1]
    local = [size // count for size, count in zip(shape, fragments, strict=True)]

    def joined(*at: int) -> Lazy:
        """All fragments whose numbers begin with these."""
        if len(at) == len(fragments):
            return flat.at(tuple(slice(number, number + 1) for number in at)).reshape(local)
        return cat([joined(*at, number) for number in range(fragments[len(at)])], len(at))

    return joined()


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
            problem(
                f"{path}", options.iteration, f"a folder with {INDEX} is there for each iteration", "Check --ckpt-step"
            )
        )
    if (folder / KIND).exists():
        backend = read_json(folder / KIND).get("sharded_backend")
        if backend != "torch_dist":
            cure = "Save it once more with --ckpt-format torch_dist"
            raise CheckpointError(
                problem(f"{folder / KIND}, sharded_backend", backend, "torch_dist alone can be read", cure)
            )
    classes: set[str] = set()
    chunked = Chunked(folder)
    classes.update(name for name in chunked.classes if not name.endswith("MCoreMetadata"))
    keys = [key for key in chunked.tensors if "optimizer." not in key and not key.startswith("rerun_state_machine")]
    model = [pair for key in keys for pair in named(chunked, key, key.removeprefix("model."))]
    content = common(folder, chunked, classes)
    parts = {
        normal: tensor
        for normal, (_, tensor) in zip(normal_names(name for name, _ in model).values(), model, strict=True)
    }
    notes = same_iteration(folder.name, content)
    return build.weights_of(
        content,
        3.0,
        [parts],
        lambda notes: states(folder, chunked),
        classes,
        options,
        Replicas(options.replicas),
        notes,
    )


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
            found.setdefault(STATES[match[1]], {}).update(
                named(chunked, key, match[2].removeprefix("model.").removeprefix("module."))
            )
    if not all(key in found for key in MOMENTS):
        flat = any("gbuf_idx" in key for key in chunked.tensors)
        rule = (
            "its flat buffers depend on settings that are not stored (save with --dist-ckpt-optim-fully-reshardable)"
            if flat else "it was saved without"
        )  # fmt: skip
        raise CheckpointError(problem(f"{folder}, optimizer", "flat buffers" if flat else None, rule, WEIGHTS_ALONE))
    normal = {key: dict(zip(normal_names(table).values(), table.values(), strict=True)) for key, table in found.items()}
    return {key: [table] for key, table in normal.items()}


FORMAT = Format("torch_dist: Megatron core's folders of .metadata, metadata.json and .distcp files", recognises, read)
