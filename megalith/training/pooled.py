"""The step of a PooledTask, in two passes: outputs of the whole global batch, then their gradients through the model.

The gradient of the losses by each output is computed once, with all outputs in memory, on every process that has the
end of the model. The second pass computes each output again and multiplies it with its gradient, so that what is
differentiated is linear in it: its gradient is exactly that of the losses (GradCache: Gao et al., 2021, arXiv
2101.06983, section 3). Dropout masks are those of the first pass, because they are a function of step and sample;
attention dropout inside fused kernels draws from a generator, which is reset before each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megalith.common.errors import TrainingError, problem
from megalith.config.flags.text import Words
from megalith.runtime.build import Mesh, Runtime
from megalith.training.tasks import Batch, PooledTask

Pool = dict[str, Tensor]  # what PooledTask.pooled returns


def run(
    runtime: Runtime, task: PooledTask, batches: Sequence[Batch], inputs: Sequence[Batch],
    loss: Callable[[Any, Batch], Tensor], iteration: int, train: bool,
) -> None:  # fmt: skip
    """Run micro-batches forward, and where `train` again with gradients. Every process calls it.

    inputs: the model's arguments for each micro-batch.
    loss: (pool of the global batch, empty batch) -> what is differentiated.
    """
    pool = collect(runtime, task, batches, inputs)
    if not train:
        if pool:
            loss(pool, {})
        return
    gradients = differentiate(pool, loss) if pool else {}
    ranks, rank = runtime.mesh.data_size, runtime.mesh.data_rank

    def linear(output: Any, number: int) -> Tensor:
        local = task.pooled(output, batches[number])
        first = number * ranks + rank  # in micro-batches: the m-th ones of all data-parallel ranks are adjacent
        rows = {name: gradient[first * len(local[name]) :][: len(local[name])] for name, gradient in gradients.items()}
        return torch.stack([(local[name].to(row.dtype) * row).sum() for name, row in rows.items()]).sum()

    runtime.begin_step(iteration)
    runtime.run(inputs, linear, train=True)


@torch.no_grad()
def collect(runtime: Runtime, task: PooledTask, batches: Sequence[Batch], inputs: Sequence[Batch]) -> Pool:
    """What `task.pooled` returns for all samples of the global batch, in order; {} without the end of the model."""
    parts: list[Pool] = []

    def keep(output: Any, number: int) -> Tensor:
        local = {name: tensor.detach() for name, tensor in task.pooled(output, batches[number]).items()}
        parts.append(
            {name: at_least_float32(tensor) if tensor.is_floating_point() else tensor for name, tensor in local.items()}
        )
        return torch.zeros((), dtype=torch.float64, device=runtime.mesh.device)

    runtime.run(inputs, keep, train=False)
    names = parts[0] if parts else ()
    return {name: gather(runtime.mesh, torch.stack([part[name] for part in parts])) for name in names}


def gather(mesh: Mesh, local: Tensor) -> Tensor:
    """[m, b, ...] of this process's micro-batches -> [m * data-parallel ranks * b, ...] of all, in order of samples."""
    gathered = mesh.gather_over_data(local).unflatten(0, (mesh.data_size, mesh.size("cp")))
    ranks = gathered.sum(dim=1) if local.is_floating_point() else gathered[:, 0]
    return ranks.transpose(0, 1).flatten(0, 2)


@torch.enable_grad()
def differentiate(pool: Pool, loss: Callable[[Any, Batch], Tensor]) -> Pool:
    """The gradient of the loss by every floating-point tensor of the pool."""
    leaves = {name: tensor.requires_grad_() for name, tensor in pool.items() if tensor.is_floating_point()}
    if not leaves:
        rule = "must have a floating-point tensor, of which the losses are computed"
        cure = "Return the embeddings of the samples"
        raise TrainingError(problem("The result of `pooled`", Words(", ".join(pool) or "nothing"), rule, cure))
    gradients = torch.autograd.grad(loss(pool, {}), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
