"""A model's weights of any format, tensor by tensor: what every importer returns and every exporter takes.

    weights = huggingface.read(FOLDER) or megatron.read(FOLDER) or read_megalith(CHECKPOINT)
    write(weights, NEW_FOLDER) or huggingface.write(weights, NEW_FOLDER) or megatron.write(weights, NEW_FOLDER, ...)

A tensor is read when it is asked for, so that the memory needed is that of the largest few.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store import dcp as store
from megalith.checkpoint.store import folder as folders
from megalith.checkpoint.store import manifest
from megalith.checkpoint.store.facts import CONFIG, TRAIN_STATE, read_config, read_train_state
from megalith.checkpoint.store.saving import SaveRequest
from megalith.checkpoint.store.saving import write as write_checkpoint
from megalith.checkpoint.tensors.chunked import INDEX, DcpFolder
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.config.adapters import is_adapter
from megalith.config.flags.loading import stored_config, to_yaml
from megalith.config.heads import is_of_head, new_head, with_head
from megalith.config.parameters import parameter_shapes
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights(Mapping[str, Tensor]):
    """Tensors under megalith's canonical names, and what else a run needs to resume from them.

    config: a whole RunConfig; its section `model` describes the model of these tensors.
    tensors: {"model/<parameter>" or "optimizer/<state>/<parameter>": Lazy}; the vocabulary at its true size.
    train_state: what `checkpoint.save` takes under that name; {} where the source has none.
    files: {name in a checkpoint: file}, such as tokenizer/tokenizer.json.
    notes: what the user should know: what was assumed, dropped or refused, a line each.
    source: the name of these weights in messages.
    """

    config: RunConfig
    tensors: Mapping[str, Lazy]
    iteration: int = 0
    train_state: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
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


def for_head(weights: Weights, model: ModelConfig) -> Weights:
    """Weights as those of `model` without its head, where they have another one or none (config/heads.py); else all.

    The head's own tensors are then to be drawn, or to be added.
    """
    then = weights.config.model
    if not (head := new_head(model, then)):
        return weights
    kept = {f"model/{name}" for name in parameter_shapes(model) if not is_of_head(name, head)}
    config = dataclasses.replace(weights.config, model=with_head(then, model))
    tensors = {name: lazy for name, lazy in weights.tensors.items() if name in kept or is_adapter(name)}
    return dataclasses.replace(weights, config=config, tensors=tensors)


def read_megalith(path: str | os.PathLike, iteration: int | None = None) -> Weights:
    """The weights of a checkpoint of megalith; path: the checkpoint itself, a folder of them, or a run's folder."""
    checkpoint = folders.find(path, iteration)
    content = manifest.read(checkpoint)
    stored = DcpFolder(checkpoint)
    own_files = {CONFIG, TRAIN_STATE, INDEX}
    carried = [name for name in content["files"] if not name.endswith(store.DATA_SUFFIX) and name not in own_files]
    return Weights(
        config=stored_config(read_config(checkpoint), str(checkpoint / CONFIG)),
        tensors={name: stored.lazy(name) for name in content["tensors"]},
        iteration=content["iteration"],
        train_state=read_train_state(checkpoint),
        files={name: checkpoint / name for name in carried},
        source=str(checkpoint),
    )


def write(weights: Weights, folder: str | os.PathLike) -> pathlib.Path:
    """Write a checkpoint of megalith into the new `folder`, tensor by tensor, and return its path.

    For one process without a process group.
    """
    folder = pathlib.Path(folder)
    folders.check_new(folder)
    layout = {name: torch.empty(lazy.shape, dtype=lazy.dtype, device="meta") for name, lazy in weights.tensors.items()}
    config_yaml = to_yaml(weights.config)
    request = SaveRequest(folder, weights.iteration, weights.train_state, config_yaml, weights.files, 0, None)
    return write_checkpoint(request, layout, weights, Ranks())
