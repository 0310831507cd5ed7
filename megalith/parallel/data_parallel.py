"""Data parallelism: fully_shard for sharded modes and 16-bit formats, a bucketed all-reduce for float32 replicas.

Float32 replicas must not keep a gathered copy beside the float32 parameters, as fully_shard would; everything else may.
docs/architecture.md, section 2, has the bytes per parameter that a rank holds between steps and during accumulation.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from megalith.common.errors import ConfigError
from megalith.config.sections.parallel import ParallelConfig
from megalith.config.sections.precision import PrecisionConfig
from megalith.parallel.mesh import Mesh
from megalith.parallel.sharding import buckets, to_local

BUCKET = 1 << 23  # elements of gradients that replicas sum in one call: 32 MiB of float32
IN_FLIGHT = 4  # such sums that run at one time, each with a copy of its gradients


def wrap(
    model: nn.Module, blocks: list[nn.Module], mesh: Mesh, parallel: ParallelConfig, precision: PrecisionConfig
) -> bool:
    """Apply fully_shard to `model` over the data-parallel axes; each of `blocks` is gathered and reduced on its own.

    Parameters become DTensors in float32 and are gathered in the compute format; gradients are summed in float32 (not
    averaged: losses are divided by global counts). Float32 replicas are left alone, as all of this would be copies;
    `Replicas` sums their gradients. Parameters may be DTensors of the tensor-parallel axis, and may be on meta. A
    float64 model stays float64.
    Returns whether the model was wrapped.
    """
    if precision.compute_dtype == "float32" and (parallel.sharding == "none" or mesh.data_size * mesh.size("cp") == 1):
        return False
    wide = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    compute = getattr(torch, precision.compute_dtype) if wide == torch.float32 else wide
    # Inputs are not cast: ids are integers, and loss weights and rotary tables must stay float32.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=wide, cast_forward_inputs=False)
    axes = _axes(mesh, parallel)
    shards, reshard = axes.size(axes.ndim - 1), parallel.sharding == "full"
    for module in [*blocks, model]:
        fully_shard(
            module,
            mesh=axes,
            mp_policy=policy,
            reshard_after_forward=reshard,
            shard_placement_fn=lambda p: shard_dim(p, shards),
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            if mesh.device.type == "cpu":  # gloo has no pre-multiplied sum
                module.set_force_sum_reduction_for_comms(True)
    return True


def _axes(mesh: Mesh, parallel: ParallelConfig) -> DeviceMesh:
    """fully_shard's mesh: shards, or replicas x shards. The cp axis is part of the shards, or without sharding of the
    replicas.
    """
    if parallel.sharding == "none":
        return DeviceMesh._concatenate([mesh.flat("dp_replicate", "dp_shard", "cp"), mesh.device_mesh["dp_shard"]])
    shards = mesh.flat("dp_shard", "cp")
    if mesh.size("dp_replicate") == 1:
        return shards
    return DeviceMesh._concatenate([mesh.device_mesh["dp_replicate"], shards])


def shard_dim(parameter: nn.Parameter, shards: int) -> Shard:
    """Which dimension fully_shard splits: the first, except where the tensor-parallel axis splits that unevenly.

    A DTensor of both axes has the wrong offsets for shards of uneven shards, and with them initial weights and
    checkpoints would be wrong.
    """
    if (
        not isinstance(parameter, DTensor)
        or Shard(0) not in parameter.placements
        or parameter.shape[0] % parameter.device_mesh.size() == 0
    ):
        return Shard(0)
    if parameter.dim() > 1 and parameter.shape[1] % shards == 0:
        return Shard(1)
    ranks = parameter.device_mesh.size()
    raise ConfigError(
        f"A parameter of shape {tuple(parameter.shape)} must have rows that the {ranks} tensor-parallel ranks divide, "
        f"or columns that the {shards} data-parallel shards divide; it has neither. "
        f"Use --data-parallel-sharding none, or another --tensor-model-parallel-size."
    )


def set_gradient_sync(model: nn.Module, last: bool, parallel: ParallelConfig, precision: PrecisionConfig) -> None:
    """Announce to a wrapped model whether the next backward pass is the step's last: only that one reduces gradients.

    Under fp16 with sharding every pass reduces, so that no rank holds whole gradients. Under ZeRO-2 gathered 16-bit
    parameters are kept from pass to pass.
    """
    if isinstance(model, FSDPModule):
        sharded = parallel.sharding != "none"
        model.set_requires_gradient_sync(last or (precision.fp16 and sharded))
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last or parallel.sharding == "full" or precision.compute_dtype == "float32")


def upcast_gradients(model: nn.Module) -> None:
    """Add gradients that came after a wrapped model's backward pass, in its compute format, to their float32 sums.

    fully_shard does so after each of its own backward passes; deferred gradients would accumulate in 16 bits until the
    next one.
    """
    for parameter in _fsdp_parameters(model):
        parameter.accumulate_unsharded_grad_if_needed()
        parameter.to_accumulated_grad_if_needed()


def discard_unsharded_gradients(model: nn.Module) -> None:
    """Forget the gradients of a wrapped model that its passes have accumulated and not reduced yet."""
    for parameter in _fsdp_parameters(model):
        parameter.unsharded_accumulated_grad = None
        if getattr(parameter, "_unsharded_param", None) is not None:
            parameter._unsharded_param.grad = None


def _fsdp_parameters(model: nn.Module) -> Iterator[Any]:
    """fully_shard's own records of a wrapped model's parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                yield from group.fsdp_params if group is not None else ()


class Replicas:
    """All-reduces the float32 gradients of replicas, bucket by bucket, during the last backward pass of a step.

    Buckets start in one order on all ranks, whatever the order in which gradients are ready; those that have not
    started by the end of the pass start in `finish`.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh):
        """model: not on meta, as hooks do not survive to_empty. mesh: the ranks that hold copies, one axis."""
        self.group, self.sync = mesh.get_group(), False
        self.buckets = list(buckets(_trained(reversed(list(model.parameters()))), BUCKET))
        self.waiting: list[set[int]] = []
        self.started = 0
        self.in_flight: collections.deque[tuple[list[Tensor], Tensor, dist.Work]] = collections.deque()
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter, number=number: self._ready(parameter, number)
                )

    def set_gradient_sync(self, last: bool) -> None:
        """Announce whether the next backward pass is the last of the step."""
        self.sync = last
        self.waiting = [{id(parameter) for parameter in _trained(bucket)} for bucket in self.buckets] if last else []

    def _ready(self, parameter: nn.Parameter, number: int) -> None:
        if self.sync:
            self.waiting[number].discard(id(parameter))
            while self.started < len(self.buckets) and not self.waiting[self.started]:
                self._start()

    @torch.no_grad()
    def _start(self) -> None:
        gradients = []
        for parameter in _trained(self.buckets[self.started]):
            if parameter.grad is None:  # unused on this rank; another may have used it
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(to_local(parameter.grad))
        self.started += 1
        if not gradients:
            return
        if len(self.in_flight) == IN_FLIGHT:
            self._end()
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.in_flight.append((gradients, flat, dist.all_reduce(flat, group=self.group, async_op=True)))

    @torch.no_grad()
    def _end(self) -> None:
        gradients, flat, work = self.in_flight.popleft()
        work.wait()
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view(gradient.shape) for part, gradient in zip(parts, gradients)])

    def finish(self) -> None:
        """Wait for all sums; the gradients are then summed over all replicas."""
        while self.started < len(self.buckets):
            self._start()
        while self.in_flight:
            self._end()
        self.started, self.sync = 0, False


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that are not frozen; they may become so after the model has been built."""
    return [parameter for parameter in parameters if parameter.requires_grad]
