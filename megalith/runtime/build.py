"""A model from its config, placed on a mesh; and the plain model for using it on one device."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from megalith.config.model import ModelConfig
from megalith.config.run import RunConfig
from megalith.models import MODELS
from megalith.parallel import data_parallel
from megalith.parallel.mesh import Mesh
from megalith.runtime.initialize import initialize


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A placed model with what its training needs to know of the place."""

    config: RunConfig
    mesh: Mesh
    model: nn.Module
    wrapped: bool  # whether fully_shard holds it

    def sync_gradients(self, last: bool) -> None:
        """Announce whether the coming backward pass is the last of the step."""
        if self.wrapped:
            data_parallel.sync_gradients(self.model, last)


def meta_model(config: ModelConfig, seed: int = 0) -> nn.Module:
    """The model without memory: shapes alone."""
    with torch.device("meta"):
        return MODELS.find(config.model_type)(config, seed)


def place(config: RunConfig, mesh: Mesh) -> Runtime:
    """Build the model on meta, split it, give it memory, draw its weights. No process ever holds a whole copy it need not hold."""
    model = meta_model(config.model, config.batch.seed)
    blocks = list(model.layers.values())
    if config.precision.compile:
        for block in blocks:
            block.compile()
    wrapped = data_parallel.wrap(model, blocks, mesh, config.parallel, config.precision)
    materialize(model, mesh.device)
    initialize(model, config.batch.seed)
    return Runtime(config, mesh, model, wrapped)


def plain(config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32, seed: int | None = None) -> nn.Module:
    """The model on one device in evaluation mode; its weights are drawn where a seed is given, else to be loaded."""
    model = meta_model(config, seed or 0)
    materialize(model, device)
    if seed is not None:
        initialize(model, seed)
    return model.to(dtype).eval()


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give a model on meta its memory, and redo what that undoes: ties between parameters, and buffers."""
    model.to_empty(device=device)
    model.restore()
