"""Low-rank adapters (LoRA) and the model that they were trained on: the base, whose weights a checkpoint of them lacks.

weights = formats.read(ADAPTERS)                     # with those of the base, which the folder names
weights = formats.read(BASE, None, {"adapter": ADAPTERS})
merge(weights)                                       # W + scale B A, of DoRA scaled, as a model without adapters

Weights with adapters have the tensors of both, and `config.lora` says how they are applied.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.checkpoint import formats
from megalith.checkpoint.tensors.lazy import Index, Lazy, slices
from megalith.checkpoint.weights import Weights, for_head, read_megalith
from megalith.common.errors import CheckpointError, problem
from megalith.config.adapters import A, B, M, adapted_modules, is_adapter
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.config.sections.lora import LoraConfig

BASE = "base"  # entry of train_state: {"path": of the base, "fingerprint": of its weights, where it is known}
NAME_IT = "Name the base too: --load BASE --adapter {0}, or megalith.load(BASE, adapter={0!r})"
SAMPLED = 64  # elements of a row that are read for a fingerprint


def read_adapter(path: str | os.PathLike, base: Weights) -> Weights:
    """The adapters of a LoRA run or of a PEFT folder, without the base. Raises CheckpointError where there are none."""
    from megalith.checkpoint.formats import peft  # which imports this module

    if peft.recognises(pathlib.Path(path)):
        return peft.read_adapter(pathlib.Path(path), base)
    found = read_megalith(path)
    if not found.config.lora.lora_rank:
        rule, cure = "must hold adapters (a run with --lora-rank, or a PEFT folder)", "Correct the path"
        raise CheckpointError(problem(f"{path}", Words("the weights of a whole model"), rule, cure))
    return found


def attach(base: Weights, adapter: Weights) -> Weights:
    """The weights of a base together with adapters. Raises CheckpointError where these belong to other weights.

    base: adapters that it has are left out.
    """
    own = {name: lazy for name, lazy in base.tensors.items() if name.startswith("model/") and not is_adapter(name)}
    base = dataclasses.replace(base, tensors=own)
    record, found = adapter.train_state.get(BASE, {}), fingerprint(base)
    if record.get("fingerprint", found) != found:
        rule = f"must have the weights that the adapters {adapter.source} were trained on, those of {record['path']}"
        cure = f"Name those: --load BASE --adapter {adapter.source}"
        raise CheckpointError(problem("The base of adapters", base.source, rule, cure))
    base = for_head(base, adapter.config.model)  # whose head was trained with the adapters
    tokenizer = [name for name in adapter.files if name.startswith("tokenizer/")]
    files = {name: file for name, file in base.files.items() if not (tokenizer and name.startswith("tokenizer/"))}
    return dataclasses.replace(
        adapter,
        config=dataclasses.replace(adapter.config, model=base.config.model),
        tensors={**base.tensors, **adapter.tensors},
        train_state={**adapter.train_state, BASE: record_of(base, found)},
        files={**files, **adapter.files},
        notes=(*base.notes, *adapter.notes, f"adapters of rank {adapter.config.lora.lora_rank} on {base.source}"),
    )


def record_of(base: Weights, found: str | None = None) -> dict[str, str]:
    """What a checkpoint of adapters says of their base. found: its fingerprint, if it is known."""
    return {"path": os.path.abspath(base.source), "fingerprint": found or fingerprint(base)}


def with_base(adapter: Weights) -> Weights:
    """Adapters attached to the base that they name. Raises CheckpointError where it is not there, or has changed."""
    return attach(open_base(adapter.train_state.get(BASE, {}).get("path"), adapter.source), adapter)


def open_base(path: str | None, adapter: str) -> Weights:
    """The base at the path that adapters name. Raises CheckpointError with the cure where it is not there."""
    if not path or not pathlib.Path(path).exists():
        rule = "must be on this machine, as adapters are changes to its weights"
        raise CheckpointError(problem(f"{adapter}: the base", path, rule, NAME_IT.format(adapter)))
    return formats.read(path)


def fingerprint(weights: Weights) -> str:
    """A hash of a model's weights, the same in every format and number format that holds them exactly.

    It costs three short reads a tensor: a part of its first, its middle and its last row.
    """
    found = hashlib.sha256()
    for name, lazy in sorted(weights.tensors.items()):
        if name.startswith("model/") and not is_adapter(name):
            found.update(f"{name} {list(lazy.shape)}".encode())
            for row in sorted({0, lazy.shape[0] // 2, lazy.shape[0] - 1}):
                box = (slice(row, row + 1), *[slice(0, SAMPLED)] * (len(lazy.shape) - 1))
                found.update(lazy.part(box).double().contiguous().numpy().tobytes())
    return found.hexdigest()[:32]


def merge(weights: Weights, widen: bool = False) -> Weights:
    """Weights whose adapters, if they have any, are added to the layers that have them: a model without adapters.

    widen: leave the sums in float32 at least, for a caller that casts them; else they have the base's number format.
    State of an optimizer and counts of steps are left out.
    """
    if not any(map(is_adapter, weights.tensors)):
        return weights
    tensors = {name: lazy for name, lazy in weights.tensors.items() if name.startswith("model/")}
    merged = {name: lazy for name, lazy in tensors.items() if not is_adapter(name)}
    for name in (name for name in tensors if name.endswith(A)):
        module = name.removesuffix(A)
        weight = f"{module}.weight"
        merged[weight] = add_product(
            merged[weight], tensors[f"{module}{B}"], tensors[name], weights.config.lora.scale, widen,
            tensors.get(f"{module}{M}"),
        )  # fmt: skip
    config = dataclasses.replace(weights.config, lora=LoraConfig())
    note = "the adapters are merged into the weights"
    return dataclasses.replace(
        weights, config=config, tensors=merged, train_state={}, iteration=0, notes=(*weights.notes, note)
    )


def add_product(weight: Lazy, b: Lazy, a: Lazy, scale: float, widen: bool, magnitude: Lazy | None = None) -> Lazy:
    """W + scale B A, computed in float32 at least, and rounded to W's number format unless `widen`.

    magnitude: of DoRA, to which each row is scaled. To find its length, the whole row is read.
    """
    wide = functools.reduce(torch.promote_types, (weight.dtype, b.dtype, torch.float32))
    result = wide if widen else weight.dtype

    def part(index: Index = ()) -> Tensor:
        rows, columns = slices(weight.shape, index)
        read = columns if magnitude is None else slice(None)
        product = b.part((rows,)).to(wide) @ a.part((slice(None), read)).to(wide)
        found = weight.part((rows, read)).to(wide).add(product, alpha=scale)
        if magnitude is not None:
            found = (F.normalize(found) * magnitude.part((rows,)).to(wide)[:, None])[:, columns]
        return found.to(result)

    return Lazy(shape=weight.shape, dtype=result, read=part, box=part)


def with_magnitudes(base: Weights, config: RunConfig) -> Weights:
    """A base with the magnitudes that DoRA begins with: the lengths of the rows of each layer that gets an adapter."""

    def lengths(weight: Lazy) -> Lazy:
        def part(index: Index = ()) -> Tensor:
            return torch.linalg.vector_norm(weight.part((*slices(weight.shape[:1], index),)).float(), dim=1)

        return Lazy(shape=weight.shape[:1], dtype=torch.float32, read=part, box=part)

    modules = adapted_modules(base.config.model, config.lora) if config.lora.use_dora else {}
    found = {f"model/{module}{M}": lengths(base.tensors[f"model/{module}.weight"]) for module in modules}
    return dataclasses.replace(base, tensors={**base.tensors, **found})
