"""Collectives of scripts: over the data-parallel processes, so that copies of a result are counted once.

Processes that differ along tp, pp or cp hold copies of the same samples. The functions have the names and arguments of
accelerate.utils; where the Accelerator is Accelerate's own they are those functions.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import operations
from torch import Tensor

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import ConfigError, TrainingError, problem
from megalith.config.flags.text import Words
from megalith.parallel.mesh import Mesh

REDUCTIONS = ("sum", "mean", "max", "none")


def current_mesh() -> Mesh | None:
    """The mesh of the run's Accelerator; None where there is none, or it is Accelerate's own."""
    return AcceleratorState._shared_state.get("mesh")


def set_mesh(mesh: Mesh) -> None:
    """Make `mesh` that of the run, in the state that Accelerate's objects have in common. Every process calls it."""
    AcceleratorState._shared_state["mesh"] = mesh
    data_group(mesh)  # made now: a loss function may ask for it on the processes of the last stage alone


def data_group(mesh: Mesh) -> dist.ProcessGroup:
    """The processes that hold other samples of the same part of the model."""
    return mesh.flat("dp_replicate", "dp_shard").get_group()


def barrier() -> None:
    """Wait for all processes of the run."""
    if dist.is_initialized():
        device = PartialState().device
        dist.barrier(device_ids=None if device.type == "cpu" else [device.index or 0])


def destroy_group() -> None:
    """Destroy the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def goes_first(first: bool) -> Iterator[None]:
    """Processes with `first` run the block before the others, which do not wait for ever where it raises there."""
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:
            barrier()


@operations.verify_operation
def gather(tensor: Any) -> Any:
    """The tensors of all data-parallel processes, joined along dimension 0 in their order; every process calls it.

    tensor: a tensor [n, ...] of the same shape on all processes, or tuples, lists and mappings of such; one without
    dimensions becomes one of 1.
    """
    mesh = current_mesh()
    if mesh is None:
        return operations.gather(tensor)
    return _apply("gather", lambda each: _gather_one(mesh, each), tensor)


def _apply(name: str, function: Callable[[Tensor], Tensor], data: Any) -> Any:
    """`function` of every tensor in nested data. name: of the collective, for the TypeError on what is no tensor."""
    function.__name__ = name
    return operations.recursively_apply(function, data, error_on_other_type=True)


def _gather_one(mesh: Mesh, tensor: Tensor) -> Tensor:
    local = tensor.detach()
    local = (local[None] if local.dim() == 0 else local).contiguous()
    if mesh.data_size == 1:
        return local.clone()
    parts = [torch.empty_like(local) for _ in range(mesh.data_size)]
    dist.all_gather(parts, local, group=data_group(mesh))
    return torch.cat(parts)


def gather_objects(object: Any) -> Any:
    """The entries of the lists of all data-parallel processes, in one list (accelerate.utils: gather_object)."""
    mesh = current_mesh()
    if mesh is None:
        return operations.gather_object(object)
    if mesh.data_size == 1:
        return list(object)
    lists = Ranks(data_group(mesh)).collect(lambda: object)
    return [entry for each in lists for entry in each]


@operations.verify_operation
def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """The sum, mean or maximum of the tensors of all data-parallel processes, times `scale`; every process calls it.

    tensor: a tensor, or tuples, lists and mappings of tensors. reduction: sum, mean, max, or none.
    """
    mesh = current_mesh()
    if mesh is None:
        return operations.reduce(tensor, reduction, scale)
    if reduction not in REDUCTIONS:
        raise ConfigError(problem("reduction", reduction, f"must be one of {', '.join(REDUCTIONS)}", "Write 'sum'"))
    return _apply("reduce", lambda each: _reduce_one(mesh, reduction, scale, each), tensor)


def _reduce_one(mesh: Mesh, reduction: str, scale: float, tensor: Tensor) -> Tensor:
    total = tensor.detach().clone()
    if mesh.data_size > 1 and reduction != "none":
        operation = dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM
        dist.all_reduce(total, operation, group=data_group(mesh))
    if reduction == "mean":
        total = total / mesh.data_size
    return total if scale == 1.0 else total * scale


def pad_across_processes(tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
    """Tensors as long along `dim` as the longest of all data-parallel processes; every process calls it.

    tensor: a tensor, or tuples, lists and mappings of tensors, of as many dimensions everywhere. pad_index: the value
    that is added. pad_first: add it before the tensor's own values.
    """
    mesh = current_mesh()
    if mesh is None:
        return operations.pad_across_processes(tensor, dim, pad_index, pad_first)
    return _apply("pad_across_processes", lambda each: _pad_one(mesh, dim, pad_index, pad_first, each), tensor)


def _pad_one(mesh: Mesh, dim: int, pad_index: int, pad_first: bool, tensor: Tensor) -> Tensor:
    if tensor.is_nested:
        text = "A nested tensor cannot be padded without more information; it stays as it is."
        warnings.warn(text, operations.CannotPadNestedTensorWarning, stacklevel=2)
        return tensor
    if not -tensor.dim() <= dim < tensor.dim():
        return tensor
    length = tensor.shape[dim]
    missing = int(_gather_one(mesh, torch.tensor(length, device=mesh.device)).max()) - length
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    added = tensor.new_full(shape, pad_index)
    return torch.cat((added, tensor) if pad_first else (tensor, added), dim)


def avg_losses_across_data_parallel_group(losses: Sequence[Tensor]) -> Tensor:
    """The means of losses over the data-parallel processes: [n], of n tensors of one element each."""
    own = torch.cat([loss.detach().reshape(1) for loss in losses])
    return _reduce_one(needed_mesh("avg_losses_across_data_parallel_group"), "mean", 1.0, own)


def gather_across_data_parallel_groups(tensor: Any) -> Any:
    """As `gather`, which does the same here: tp, pp and cp copies are counted once."""
    needed_mesh("gather_across_data_parallel_groups")
    return gather(tensor)


def needed_mesh(what: str) -> Mesh:
    """The mesh of the run. Raises TrainingError where there is no Accelerator with a MegatronLMPlugin yet."""
    mesh = current_mesh()
    if mesh is None:
        cure = "Make one first: Accelerator(megatron_lm_plugin=MegatronLMPlugin(...))"
        rule = "needs an Accelerator with a MegatronLMPlugin"
        raise TrainingError(problem(what, Words("no such Accelerator"), rule, cure))
    return mesh
