"""A model's weights from anywhere, tensor by tensor: what every importer gives and every exporter takes.

    weights = huggingface.read(FOLDER) or megatron.read(FOLDER) or own(CHECKPOINT)
    write(weights, NEW_FOLDER) or huggingface.write(weights, NEW_FOLDER) or megatron.write(weights, NEW_FOLDER, ...)

A tensor is read when it is asked for, so that the memory needed is that of the largest few.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store import dcp as store
from megalith.checkpoint.store import folder as folders
from megalith.checkpoint.store import manifest
from megalith.checkpoint.store.facts import CONFIG, TRAIN_STATE, read_config, read_train_state
from megalith.checkpoint.store.saving import Order
from megalith.checkpoint.store.saving import write as write_checkpoint
from megalith.checkpoint.tensors.chunked import INDEX, Chunked
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.config.flags.loading import stored_config, to_yaml
from megalith.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Weights(Mapping[str, Tensor]):
    """Tensors under our canonical names, and what else going on needs.

    config: a whole RunConfig; its section `model` says what the tensors make.
    tensors: {"model/<parameter>" or "optimizer/<state>/<parameter>": Lazy}; the vocabulary at its true size.
    train_state: what `checkpoint.save` takes under that name; {} where the source has none.
    files: {name in a checkpoint: file}, such as tokenizer/tokenizer.json.
    notes: what a reader should know: what was assumed, dropped or refused, a line each.
    source: what messages call it.
    """

    config: RunConfig
    tensors: Mapping[str, Lazy]
    iteration: int = 0
    train_state: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, pathlib.Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    source: str = "the weights"

    @property
    def tokenizer(self) -> pathlib.Path | None:
        """The folder of the tokenizer's files; None where it has none."""
        return next((file.parent for name, file in self.files.items() if name.startswith("tokenizer/")), None)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def own(path: str | os.PathLike, iteration: int | None = None) -> Weights:
    """Those of a checkpoint of ours: the checkpoint itself, a folder of them, or a run's folder."""
    place = folders.find(path, iteration)
    content = manifest.read(place)
    chunked = Chunked(place)
    others = {CONFIG, TRAIN_STATE, INDEX}
    return Weights(
        config=stored_config(read_config(place), str(place / CONFIG)),
        tensors={name: chunked.lazy(name) for name in content["tensors"]},
        iteration=content["iteration"],
        train_state=read_train_state(place),
        files={name: place / name for name in content["files"] if not name.endswith(store.DATA) and name not in others},
        source=str(place),
    )


def write(weights: Weights, folder: str | os.PathLike) -> pathlib.Path:
    """Write a checkpoint of ours into the new `folder` and return its path; one process, no group, tensor by tensor."""
    place = pathlib.Path(folder)
    folders.check_new(place)
    layout = {name: torch.empty(lazy.shape, dtype=lazy.dtype, device="meta") for name, lazy in weights.tensors.items()}
    order = Order(place, weights.iteration, weights.train_state, to_yaml(weights.config), weights.files, 0, None)
    return write_checkpoint(order, layout, weights, Ranks())
