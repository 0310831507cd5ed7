"""Building a model from its config, or from weights that exist: on a device mesh, or unsharded on one device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store import fit
from megalith.checkpoint.store.dcp import fill
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError
from megalith.common.registry import load
from megalith.config.adapters import M, adapted_modules, adapter_shapes, is_adapter, trained_whole
from megalith.config.architectures import ARCHITECTURES, architecture
from megalith.config.checks.lora import stage_problems
from megalith.config.flags.loading import to_yaml
from megalith.config.flags.text import fail
from megalith.config.heads import is_of_head
from megalith.config.run import RunConfig
from megalith.config.sections.lora import LoraConfig
from megalith.config.sections.model import ModelConfig
from megalith.config.stages import SPLIT_BACKWARD, layers_of, schedule_of, stages_of
from megalith.layers.dropout import Dropout
from megalith.layers.random import key
from megalith.models import protocol
from megalith.parallel import context, data_parallel, matmul, plan, recompute
from megalith.parallel import lora as low_rank
from megalith.parallel.collectives import Axis
from megalith.parallel.mesh import Mesh, build_mesh, init_distributed, init_mesh, process_group
from megalith.parallel.pipeline.deferred import WeightGradientQueue
from megalith.parallel.pipeline.pipeline import Pipeline
from megalith.parallel.pipeline.shared import SharedParameters
from megalith.parallel.pipeline.split import Cut, canonical_names
from megalith.parallel.sequence import sequence_axes, unsharded_sequences
from megalith.parallel.shared_memory import SharedMemorySum, shared_memory_sum
from megalith.parallel.stage_module import StageModule
from megalith.runtime.initialize import initialize

__all__ = [
    "Mesh",
    "Runtime",
    "build_mesh",
    "build_model",
    "build_runtime",
    "init_distributed",
    "init_mesh",
    "meta_model",
    "process_group",
]


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A model on a device mesh, with what its training needs to know of the mesh.

    stages: the stages of the model that this process runs. Without a pipeline there is one, the whole model.
    """

    config: RunConfig
    mesh: Mesh
    stages: tuple[StageModule, ...]
    num_parameters: int  # of the whole model, shared ones counted once
    pipeline: Pipeline | None = None
    shared: SharedParameters | None = None  # parameters that several stages hold; None without a pipeline
    trained: list[int] = dataclasses.field(default_factory=lambda: [0])  # see weights_version

    @property
    def model(self) -> nn.Module:
        """The model, or the stage of it, where this process runs only one."""
        (stage,) = self.stages
        return stage.model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This process's parameters under their names in the whole model.

        A name comes twice where two stages of this process hold copies of a shared parameter.
        """
        for stage in self.stages:
            yield from stage.named_parameters()

    def named_tensors(self, of: Callable[[nn.Parameter], Tensor | None]) -> tuple[list[tuple[str, Tensor]], set[int]]:
        """The (name, tensor) pairs of what `of` gives for each parameter, without those where it gives None.

        The second value is the positions in this list of tensors that are not owned: they belong to copies of
        parameters that another stage owns, and are counted there (optim/clip.py). Positions and not names, because a
        process may hold both a parameter and its copy.
        """
        named: list[tuple[str, Tensor]] = []
        not_owned: set[int] = set()
        for name, parameter in self.named_parameters():
            if (tensor := of(parameter)) is None:
                continue
            if self.shared is not None and id(parameter) in self.shared.not_owned:
                not_owned.add(len(named))
            named.append((name, tensor))
        return named, not_owned

    def gradients(self) -> tuple[list[tuple[str, Tensor]], set[int]]:
        """The `named_tensors` of all gradients that exist; a name may come twice."""
        return self.named_tensors(lambda parameter: parameter.grad)

    def train(self, mode: bool = True) -> None:
        """Switch to training mode, or to evaluation mode."""
        for stage in self.stages:
            stage.model.train(mode)

    def begin_step(self, iteration: int) -> None:
        """Prepare training step `iteration`: training mode, and the seed of the device's generator."""
        self.train()
        self.seed_device(iteration)

    def seed_device(self, iteration: int) -> None:
        """Seed the device's generator for a training step. Only dropout inside fused attention draws from it."""
        if self.mesh.device.type != "cpu":
            torch.get_device_module(self.mesh.device).manual_seed(key(self.config.batch.seed, "step", iteration))

    def prepare_batch(self, batch: Mapping[str, Tensor], sequences: Mapping[str, str]) -> dict[str, Tensor]:
        """A micro-batch on the device, under context parallelism this rank's shard of it.

        The copy does not wait where the batch's memory is pinned.
        sequences: see parallel/context.py, shard_batch.
        """
        on_device = {name: tensor.to(self.mesh.device, non_blocking=True) for name, tensor in batch.items()}
        if self.mesh.size("cp") == 1:
            return on_device
        return context.shard_batch(on_device, Axis(self.mesh.device_mesh["cp"]), sequences)

    def run(self, inputs: Sequence[Mapping[str, Tensor]], loss: Callable[[Tensor, int], Tensor], train: bool) -> None:
        """Run this process's micro-batches forward, and in training mode backward. Every process calls it.

        inputs: the model's keyword arguments for each micro-batch.
        loss: from the model's output and the number of the micro-batch to the 0-dimensional tensor to differentiate.
            It is called on the last stage, so on some processes never.
        """
        if self.pipeline is not None:
            self.pipeline.run(inputs, loss, train)
        else:
            (stage,) = self.stages
            for number, arguments in enumerate(inputs):
                if train:
                    stage.set_gradient_sync(last=number == len(inputs) - 1)
                value = loss(stage.model(**arguments), number)
                if train:
                    value.backward()
        if not train:
            for stage in self.stages:
                stage.reshard()

    def forward(
        self, inputs: Tensor | None, models: Sequence[Callable[..., Any]] | None = None, **arguments: Any
    ) -> Tensor | None:  # fmt: skip
        """One forward pass of whole sequences of any length, without a schedule: the model's output.

        It is None on processes that do not run the last stage. Every process of a model (axes pp and tp) calls it.
        inputs, arguments: see Pipeline.forward. models: compiled forms of the stages' models to call instead.
        """
        models = models or [stage.model for stage in self.stages]
        _ = self.shared_memory  # the first call has an effect
        with unsharded_sequences(self.sequence_axes):
            if self.pipeline is not None:
                return self.pipeline.forward(inputs, arguments, models)
            return models[0](inputs, **arguments)

    @functools.cached_property
    def sequence_axes(self) -> list[Axis]:
        """The axes along which sequences are sharded."""
        return [axis for stage in self.stages for axis in sequence_axes(stage.model)]

    @functools.cached_property
    def shared_memory(self) -> SharedMemorySum | None:
        """Where the first call lets passes without gradient sum over the tensor-parallel axis; None: it cannot be had.

        Every process of the axis calls it.
        """
        if self.mesh.device.type != "cpu":
            return None
        found = shared_memory_sum(Ranks(self.mesh.device_mesh.get_group("tp")), self.mesh.device)
        axes = [getattr(module, "axis", None) for stage in self.stages for module in stage.model.modules()]
        for axis in axes:
            if isinstance(axis, Axis) and axis.mesh.mesh_dim_names == ("tp",):
                axis.shared_memory = found
        return found

    @property
    def has_last_stage(self) -> bool:
        """Whether this process gets the model's output."""
        return self.pipeline is None or self.pipeline.ranks[-1] == self.mesh.rank("pp")

    def from_last_stage(self, values: Tensor) -> Tensor:
        """`values` of a process with the last stage, on the other stages' processes too, in place."""
        return values if self.pipeline is None else self.mesh.broadcast(values, "pp", self.pipeline.ranks[-1])

    @property
    def weights_version(self) -> int:
        """A number that is another one when the model has been trained: how often `evaluating` found it in training.

        It is the same on all processes. (Tensors' own counts of changes miss those by fused optimizers.)
        """
        return self.trained[0]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block the model is ready for `forward`; afterwards it is as it was. Every process calls it.

        It is in evaluation mode, its blocks are not compiled (each shape would be compiled anew), and parameters that
        data-parallel processes shard are gathered: the memory of them all, in the compute format.
        """
        modes = [(module, module.training) for stage in self.stages for module in stage.model.modules()]
        blocks = [block for stage in self.stages for block in stage.model.layers.values()]
        compiled = [(block, vars(block).pop("forward")) for block in blocks if "forward" in vars(block)]
        self.train(False)
        self.trained[0] += any(training for _, training in modes)
        try:
            with contextlib.ExitStack() as stack:
                for stage in self.stages:
                    stack.enter_context(stage.gathered())
                yield
        finally:
            for module, training in modes:
                module.training = training
            for block, forward in compiled:
                block.forward = forward

    def finish_gradients(self, sum_replicas: bool = True) -> None:
        """After the last backward pass of a step: the gradients are those of the global batch, on every process.

        sum_replicas: see StageModule.finish_gradients.
        """
        for stage in self.stages:
            stage.finish_gradients(sum_replicas)
        if self.shared is not None:
            self.shared.sum_gradients()


def meta_model(config: ModelConfig, seed: int = 0) -> nn.Module:
    """The model on the meta device: shapes, no memory.

    Raises ConfigError where it is not what its architecture record and models/protocol.py say.
    """
    with torch.device("meta"):
        model = config.architecture.find("model")(config, seed)
    protocol.check(model, config)
    return model


def build_runtime(
    config: RunConfig, mesh: Mesh, dtype: torch.dtype = torch.float32, weights: Weights | None = None,
    drawn: Collection[str] = (),
) -> Runtime:  # fmt: skip
    """Build the model on meta, split it, give it memory and weights. No process holds more of it than it needs.

    dtype: of the weights; float64 is for checks of layouts against one another.
    weights: a checkpoint of any format, or a model that exists (runtime/load.py, `weights_of`). Each process reads only
        the part that it holds. None draws initial weights. With LoRA adapters that they lack are drawn.
    drawn: parameters that `weights` lack, and that are drawn.
    Raises CheckpointError where the weights are of another model than `config` describes, ConfigError where a pipeline
    stage would have no adapter.
    """
    full_model = meta_model(config.model, config.batch.seed)
    if weights is not None:
        check_weights(weights, full_model, config.lora, drawn)
    fail(each.text for each in stage_problems(config))
    names, number = canonical_names(full_model), sum(parameter.numel() for parameter in full_model.parameters())
    own_dtype = dtype
    if config.lora.lora_rank and dtype == torch.float32:  # what is frozen needs no master wider than the computation
        own_dtype = getattr(torch, config.precision.compute_dtype)
    if mesh.size("pp") == 1:
        stage = build_stage(config, mesh, cast(full_model, own_dtype), 0, names, weights=weights, dtype=dtype)
        return Runtime(config, mesh, (stage,), number)
    cut = Cut(config.model.architecture.find("stages"), layers_of(config), config.model)
    indices, schedule = stages_of(config, mesh.rank("pp")), schedule_of(config.parallel)
    queues = [WeightGradientQueue() if schedule in SPLIT_BACKWARD else None for _ in indices]
    stages = []
    for index, queue in zip(indices, queues, strict=True):
        model = cast(meta_model(config.model, config.batch.seed), own_dtype)
        cut.apply(model, index)
        stages.append(build_stage(config, mesh, model, index, names, queue, weights, dtype))
    ranks = {index: rank for rank in range(mesh.size("pp")) for index in stages_of(config, rank)}
    shared = SharedParameters(cut.copies(names), stages, ranks, mesh)
    sequence_shards, compute = mesh.size("tp") if config.parallel.sequence_parallel else 1, stages[0].compute_dtype
    pipeline = Pipeline(
        schedule, cut, stages, mesh, config.model.hidden_size, compute, sequence_shards, queues,
        [rank for _, rank in sorted(ranks.items())],
    )  # fmt: skip
    return Runtime(config, mesh, tuple(stages), number, pipeline, shared)


def check_weights(
    weights: Weights, model: nn.Module, lora: LoraConfig | None = None, drawn: Collection[str] = ()
) -> None:  # fmt: skip
    """Raise CheckpointError where weights are another model's, with both values of what differs.

    model: may be on meta. lora: of adapters that the weights may have, all of them or none.
    drawn: parameters that they lack.
    """
    if another := fit.describe_model_difference(weights.source, model.config, weights.config.model):
        raise CheckpointError(another)
    found = {name: list(lazy.shape) for name, lazy in weights.tensors.items() if name.startswith("model/")}
    expected = {f"model/{name}": list(parameter.shape) for name, parameter in model.named_parameters()}
    for name in drawn:
        del expected[f"model/{name}"]
    if lora is not None and any(map(is_adapter, found)):
        shapes = adapter_shapes(model.config, lora).items()
        begin = all(name.endswith(M) for name in filter(is_adapter, found))  # DoRA, whose A and B are drawn
        expected |= {f"model/{name}": list(shape) for name, shape in shapes if name.endswith(M) or not begin}
    if lines := fit.differences(expected, found, fit.model_section(to_yaml(weights.config))):
        raise CheckpointError(fit.report(weights.source, lines))


def build_stage(
    config: RunConfig, mesh: Mesh, model: nn.Module, stage_index: int, names: Mapping[str, str],
    queue: WeightGradientQueue | None = None, weights: Weights | None = None, dtype: torch.dtype = torch.float32,
) -> StageModule:  # fmt: skip
    """Split a model on meta, or a stage of one, over the other axes; give it memory and weights.

    dtype: of adapters. queue: takes weight gradients where the schedule defers them. weights: see `build_runtime`.
    """
    if mesh.size("tp") > 1:
        plan.apply(model, plan_of(config), Axis(mesh.device_mesh["tp"], config.parallel.sequence_parallel))
    if queue is not None:
        matmul.set_matmul(matmul.Matmul(queue), model)
    if config.lora.lora_rank:
        add_adapters(model, config.lora, dtype)
    if config.finetuning.retro_freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_of_head(name, config.model.architecture.head))
    if mesh.size("cp") > 1:
        context.apply(model, Axis(mesh.device_mesh["cp"]))
    recompute.apply(model, config.recompute)
    blocks = list(model.layers.values())
    if config.precision.compile:
        for block in blocks:  # forward alone: the hooks of fully_shard would break the graph
            block.forward = torch.compile(block.forward, fullgraph=True)
    wrapped = data_parallel.wrap(model, blocks, mesh, config.parallel, config.precision)
    materialize(model, mesh.device)
    given = {}
    if weights is not None:
        local = {names.get(name, name): parameter for name, parameter in model.named_parameters()}
        given = {name: parameter for name, parameter in local.items() if f"model/{name}" in weights.tensors}
        named = {f"model/{name}": parameter for name, parameter in given.items()}
        Ranks().on_every_rank(lambda: fill(weights.tensors, named))
    initialize(model, config.batch.seed, names, except_for=given)
    replicas = None
    if not wrapped and mesh.data_size * mesh.size("cp") > 1:
        replicas = data_parallel.Replicas(model, mesh.flat("dp_replicate", "dp_shard", "cp"))
    return StageModule(model, stage_index, names, wrapped, replicas, config.parallel, config.precision)


def plan_of(config: RunConfig) -> plan.Plan:
    """The tensor-parallel plan: the model's, or the one that the config names, which may be another model's."""
    named = config.parallel.tensor_parallel_plan
    if named is None or named in ARCHITECTURES:
        return (config.model.architecture if named is None else architecture(named)).find("plan")
    return load("tensor-parallel plan", named)


def add_adapters(model: nn.Module, lora: LoraConfig, dtype: torch.dtype) -> None:
    """Freeze a model on meta, or a stage of one, but for its head, split or not, and give it adapters of this dtype."""
    low_rank.apply(model, adapted_modules(model.config, lora), lora, Dropout, dtype, trained_whole(model.config))


def build_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32, seed: int | None = None,
    lora: LoraConfig | None = None,
) -> nn.Module:  # fmt: skip
    """The model on one device, in evaluation mode. Its weights are drawn from `seed`; None leaves them to be loaded.

    lora: the adapters that it gets.
    """
    model = cast(meta_model(config, seed or 0), dtype)
    if lora is not None:
        add_adapters(model, lora, dtype)
    materialize(model, device)
    if seed is not None:
        initialize(model, seed)
    return model.eval()


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model on meta with parameters of this dtype; buffers (ALiBi's slopes) keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give a model on meta its memory, and redo what that undoes: ties between parameters, and buffers."""
    model.to_empty(device=device)
    model.restore()
