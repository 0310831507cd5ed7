"""Data parallelism and number formats, both by fully_shard: the one mechanism for them."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megalith.config.parallel import ParallelConfig
from megalith.config.precision import PrecisionConfig
from megalith.parallel.mesh import Mesh


def wrap(model: nn.Module, blocks: list[nn.Module], mesh: Mesh, parallel: ParallelConfig, precision: PrecisionConfig) -> bool:
    """Spread `model` over the data-parallel axes; each of `blocks` is gathered and reduced on its own. Works on meta.

    Parameters become DTensors in float32 and are gathered in the compute format; gradients are summed (not averaged:
    losses are divided by global counts) in float32. One process in float32 is left alone, as all of this would be copies.
    Returns whether the model was wrapped.
    """
    if mesh.data_size * mesh.size("cp") == 1 and precision.compute_dtype == "float32":
        return False
    compute = getattr(torch, precision.compute_dtype)
    # Inputs are not cast: ids are integers, and loss weights and rotary tables must stay float32.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if parallel.sharding == "none":
        axes = mesh.devices["dp_replicate", "dp_shard"]
    elif mesh.size("dp_replicate") == 1:
        axes = mesh.devices["dp_shard"]
    else:
        axes = mesh.devices["dp_replicate", "dp_shard"]
    reshard = parallel.sharding == "full"
    for module in [*blocks, model]:
        fully_shard(module, mesh=axes, mp_policy=policy, reshard_after_forward=reshard)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            if mesh.device.type == "cpu":  # gloo has no pre-multiplied sum
                module.set_force_sum_reduction_for_comms(True)
    return True


def sync_gradients(model: nn.Module, last: bool) -> None:
    """Tell the model whether the coming backward pass is the last of the step: only then are gradients reduced."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
