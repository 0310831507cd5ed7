"""A model from its config, or one that exists, placed on a mesh; and the plain model for using it on one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store import fit
from megalith.checkpoint.store.dcp import fill
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError
from megalith.common.registry import load
from megalith.config.architectures import ARCHITECTURES, architecture
from megalith.config.flags.loading import to_yaml
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.config.stages import SPLIT_BACKWARD, layers_of, schedule_of, stages_of
from megalith.layers.random import key
from megalith.models import protocol
from megalith.parallel import context, data_parallel, matmul, plan, recompute
from megalith.parallel.collectives import Axis
from megalith.parallel.mesh import Mesh, grid, join, start
from megalith.parallel.part import Part
from megalith.parallel.pipeline.cut import Cut, canonical_names
from megalith.parallel.pipeline.deferred import Queue
from megalith.parallel.pipeline.pipeline import Pipeline
from megalith.parallel.pipeline.shared import Shared
from megalith.runtime.initialize import initialize

__all__ = ["Mesh", "Runtime", "grid", "join", "meta_model", "place", "plain", "start"]


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A placed model with what its training needs to know of the place.

    parts: the stages of the model that this process runs; one, the whole model, where there is no pipeline.
    """

    config: RunConfig
    mesh: Mesh
    parts: tuple[Part, ...]
    num_parameters: int  # of the whole model, shared ones counted once
    pipeline: Pipeline | None = None
    shared: Shared | None = None  # parameters that several stages hold

    @property
    def model(self) -> nn.Module:
        """The model, where this process runs one part of it."""
        (part,) = self.parts
        return part.model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This process's parameters under their names in the whole model; a name comes twice where two parts hold copies."""
        for part in self.parts:
            yield from part.named_parameters()

    def tensors(self, of: Callable[[nn.Parameter], Tensor | None]) -> tuple[list[tuple[str, Tensor]], set[str]]:
        """(name, tensor) pairs of what `of` gives for each parameter, and the names of those that are counted elsewhere.

        Those are copies of parameters that another stage owns; their names have a mark, as a process may hold both.
        """
        named, copies = [], set()
        for name, parameter in self.named_parameters():
            if (tensor := of(parameter)) is None:
                continue
            if self.shared is not None and id(parameter) in self.shared.copies:
                name += " (copy)"
                copies.add(name)
            named.append((name, tensor))
        return named, copies

    def gradients(self) -> tuple[list[tuple[str, Tensor]], set[str]]:
        """`tensors` of the gradients that there are."""
        return self.tensors(lambda parameter: parameter.grad)

    def train(self, mode: bool = True) -> None:
        """Switch to training mode, or to evaluation mode."""
        for part in self.parts:
            part.model.train(mode)

    def begin_step(self, iteration: int) -> None:
        """Make ready for training step `iteration`. Dropout inside fused attention is all that draws from a generator."""
        self.train()
        if self.mesh.device.type != "cpu":
            torch.manual_seed(key(self.config.batch.seed, "step", iteration))

    def take(self, batch: Mapping[str, Tensor], sequences: Mapping[str, str]) -> dict[str, Tensor]:
        """A micro-batch on the device, without waiting where its memory is pinned; of its tokens those that are worked on here.

        sequences: as parallel/context.py, part.
        """
        here = {name: tensor.to(self.mesh.device, non_blocking=True) for name, tensor in batch.items()}
        return here if self.mesh.size("cp") == 1 else context.part(here, Axis(self.mesh.devices["cp"]), sequences)

    def run(self, inputs: Sequence[Mapping[str, Tensor]], loss: Callable[[Tensor, int], Tensor], train: bool) -> None:
        """Run this process's micro-batches forward, and in training mode backward. Every process calls it.

        inputs: the model's keyword arguments for each micro-batch.
        loss: given the model's output and the number of the micro-batch, the 0-dimensional tensor to differentiate. It is
            called where the end of the model is, so on some processes never.
        """
        if self.pipeline is not None:
            self.pipeline.run(inputs, loss, train)
        else:
            (part,) = self.parts
            for number, arguments in enumerate(inputs):
                if train:
                    part.sync_gradients(last=number == len(inputs) - 1)
                value = loss(part.model(**arguments), number)
                if train:
                    value.backward()
        if not train:
            for part in self.parts:
                part.reshard()

    def finish_gradients(self) -> None:
        """After the last backward pass of a step: the gradients are those of the global batch, on every process."""
        for part in self.parts:
            part.finish_gradients()
        if self.shared is not None:
            self.shared.sum_gradients()


def meta_model(config: ModelConfig, seed: int = 0) -> nn.Module:
    """The model without memory: shapes alone. Raises ConfigError where it is not what its record and
    models/protocol.py say.
    """
    with torch.device("meta"):
        model = config.architecture.find("model")(config, seed)
    protocol.check(model, config)
    return model


def place(config: RunConfig, mesh: Mesh, dtype: torch.dtype = torch.float32, weights: Weights | None = None) -> Runtime:
    """Build the model on meta, split it, give it memory and weights. No process holds a whole copy it need not hold.

    dtype: of the weights; float64 is for checks of layouts against one another. weights: what they are, of which each
    process reads the part that it holds: a checkpoint of any format, or a model that exists (runtime/load.py,
    `weights_of`); None draws them. Raises CheckpointError where they are another model's than `config` describes.
    """
    whole = meta_model(config.model, config.batch.seed)
    if weights is not None:
        check_weights(weights, whole)
    names, number = canonical_names(whole), sum(parameter.numel() for parameter in whole.parameters())
    if mesh.size("pp") == 1:
        return Runtime(config, mesh, (settle(config, mesh, whole.to(dtype), 0, names, weights=weights),), number)
    cut = Cut(config.model.architecture.find("stages"), layers_of(config), config.model)
    stages, schedule = stages_of(config, mesh.place("pp")), schedule_of(config.parallel)
    queues = [Queue() if schedule in SPLIT_BACKWARD else None for _ in stages]
    parts = []
    for stage, queue in zip(stages, queues, strict=True):
        model = meta_model(config.model, config.batch.seed).to(dtype)
        cut.apply(model, stage)
        parts.append(settle(config, mesh, model, stage, names, queue, weights))
    processes = {stage: process for process in range(mesh.size("pp")) for stage in stages_of(config, process)}
    shared = Shared(cut.holders(names), parts, processes, mesh)
    compute = dtype if dtype == torch.float64 else getattr(torch, config.precision.compute_dtype)
    sequence = mesh.size("tp") if config.parallel.sequence_parallel else 1
    pipeline = Pipeline(schedule, cut, parts, mesh, config.model.hidden_size, compute, sequence, queues)
    return Runtime(config, mesh, tuple(parts), number, pipeline, shared)


def check_weights(weights: Weights, model: nn.Module) -> None:
    """Raise CheckpointError where weights are another model's, with both values of what differs. model: may be on meta."""
    if another := fit.another_model(weights.source, model.config, weights.config.model):
        raise CheckpointError(another)
    found = {name: list(lazy.shape) for name, lazy in weights.tensors.items() if name.startswith("model/")}
    asked = {f"model/{name}": list(parameter.shape) for name, parameter in model.named_parameters()}
    if lines := fit.differences(asked, found, fit.model_section(to_yaml(weights.config))):
        raise CheckpointError(fit.report(weights.source, lines))


def settle(
    config: RunConfig, mesh: Mesh, model: nn.Module, stage: int, names: Mapping[str, str], queue: Queue | None = None,
    weights: Weights | None = None,
) -> Part:  # fmt: skip
    """A model on meta, or a stage of one, split over the other axes, with memory and weights.

    queue: where weight gradients are put off. weights: see `place`.
    """
    if mesh.size("tp") > 1:
        plan.apply(model, plan_of(config), Axis(mesh.devices["tp"], config.parallel.sequence_parallel))
    if queue is not None:
        matmul.use(matmul.Matmul(queue), model)
    if mesh.size("cp") > 1:
        context.apply(model, Axis(mesh.devices["cp"]))
    recompute.apply(model, config.recompute)
    blocks = list(model.layers.values())
    if config.precision.compile:
        for block in blocks:  # forward alone: the hooks of fully_shard would break the graph
            block.forward = torch.compile(block.forward, fullgraph=True)
    wrapped = data_parallel.wrap(model, blocks, mesh, config.parallel, config.precision)
    materialize(model, mesh.device)
    if weights is None:
        initialize(model, config.batch.seed, names)
    else:
        own = {f"model/{names.get(name, name)}": each for name, each in model.named_parameters()}
        Ranks().every(lambda: fill(weights.tensors, own))
    replicas = None
    if not wrapped and mesh.data_size * mesh.size("cp") > 1:
        replicas = data_parallel.Replicas(model, mesh.flat("dp_replicate", "dp_shard", "cp"))
    return Part(model, stage, names, wrapped, replicas, config.parallel, config.precision)


def plan_of(config: RunConfig) -> plan.Plan:
    """The tensor-parallel plan: that of the model, or the one named, which may be another model's."""
    named = config.parallel.tensor_parallel_plan
    if named is None or named in ARCHITECTURES:
        return (config.model.architecture if named is None else architecture(named)).find("plan")
    return load("tensor-parallel plan", named)


def plain(
    config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32, seed: int | None = None
) -> nn.Module:
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
