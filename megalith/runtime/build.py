"""A model from its config, placed on a mesh; and the plain model for using it on one device."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from megalith.config.model import ModelConfig
from megalith.config.run import RunConfig
from megalith.layers.random import key
from megalith.models import MODELS
from megalith.parallel import data_parallel, plan, tensor
from megalith.parallel.collectives import Axis
from megalith.parallel.mesh import Mesh, start
from megalith.runtime.initialize import initialize

__all__ = ["Mesh", "Runtime", "meta_model", "place", "plain", "start"]


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A placed model with what its training needs to know of the place."""

    config: RunConfig
    mesh: Mesh
    model: nn.Module
    wrapped: bool  # whether fully_shard holds it
    replicas: data_parallel.Replicas | None = None

    def begin_step(self, iteration: int) -> None:
        """Make ready for training step `iteration`. Dropout inside fused attention is all that draws from a generator."""
        self.model.train()
        if self.mesh.device.type != "cpu":
            torch.manual_seed(key(self.config.batch.seed, "step", iteration))

    def sync_gradients(self, last: bool) -> None:
        """Announce whether the coming backward pass is the last of the step."""
        if self.wrapped:
            data_parallel.sync_gradients(self.model, last, self.config.parallel, self.config.precision)
        if self.replicas is not None:
            self.replicas.arm(last)

    def finish_gradients(self) -> None:
        """After the last backward pass of a step: the gradients are those of the global batch, on every process."""
        if self.replicas is not None:
            self.replicas.finish()
        if self.mesh.size("tp") > 1:
            tensor.sum_gradients(self.model)


def meta_model(config: ModelConfig, seed: int = 0) -> nn.Module:
    """The model without memory: shapes alone."""
    with torch.device("meta"):
        return MODELS.find(config.model_type)(config, seed)


def place(config: RunConfig, mesh: Mesh, dtype: torch.dtype = torch.float32) -> Runtime:
    """Build the model on meta, split it, give it memory, draw its weights. No process ever holds a whole copy it need not hold.

    dtype: of the weights; float64 is for checks of layouts against one another.
    """
    model = meta_model(config.model, config.batch.seed).to(dtype)
    if mesh.size("tp") > 1:
        table = plan.PLANS.find(config.parallel.tensor_parallel_plan or config.model.model_type)
        plan.apply(model, table, Axis(mesh.devices["tp"], config.parallel.sequence_parallel))
    blocks = list(model.layers.values())
    if config.precision.compile:
        for block in blocks:  # forward alone: the hooks of fully_shard would break the graph
            block.forward = torch.compile(block.forward, fullgraph=True)
    wrapped = data_parallel.wrap(model, blocks, mesh, config.parallel, config.precision)
    materialize(model, mesh.device)
    initialize(model, config.batch.seed)
    replicas = None
    if not wrapped and mesh.data_size * mesh.size("cp") > 1:
        replicas = data_parallel.Replicas(model, mesh.flat("dp_replicate", "dp_shard", "cp"))
    return Runtime(config, mesh, model, wrapped, replicas)


def plain(config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32, seed: int | None = None) -> nn.Module:
    """The model on one device in evaluation mode; its weights are drawn where a seed is given, else to be loaded."""
    model = meta_model(config, seed or 0)
    for parameter in model.parameters():  # not model.to: buffers (ALiBi's slopes) keep their precision
        parameter.data = parameter.data.to(dtype)
    materialize(model, device)
    if seed is not None:
        initialize(model, seed)
    return model.eval()


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give a model on meta its memory, and redo what that undoes: ties between parameters, and buffers."""
    model.to_empty(device=device)
    model.restore()
