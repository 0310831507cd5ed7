"""Is a layout right? Loss and every gradient of one step in it, against one process.

The measure is the norm of the difference over the norm of the gradient, for each parameter by name (elementwise
relative errors mean nothing: only reordering a sum gave 9 %). At most 1e-10 in float64, 1e-5 in float32. A parameter
whose true gradient is zero, as that of a key bias, is compared with the norm of all gradients.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megalith.config.adapters import B
from megalith.config.run import RunConfig
from megalith.parallel import mesh as meshes
from megalith.parallel.mesh import Mesh
from megalith.runtime.build import Runtime, build_runtime
from megalith.runtime.initialize import fill
from megalith.training.forward_backward import forward_backward
from megalith.training.tasks import build_task

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
Batch = dict[str, Tensor]


@dataclasses.dataclass
class LayoutResult:
    """One rank's result of a step: the loss of the global batch, initial weights and gradients, unsharded, by name."""

    loss: float
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    extra: Any = None  # what the caller's function `extra` returned

    @property
    def norm(self) -> float:
        """Norm of all gradients."""
        return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in self.gradients.values()))


def merge(results: list[LayoutResult]) -> LayoutResult:
    """The result of all ranks together, as each pipeline stage has parameters of its own."""
    weights, gradients = {}, {}
    for result in reversed(results):
        weights.update(result.weights)
        gradients.update(result.gradients)
    return dataclasses.replace(results[0], weights=weights, gradients=gradients)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a quantity is from that of one process: `error` is relative, as the docstring of the module says."""

    name: str
    error: float


def batch(config: RunConfig, step: int = 0) -> Batch:
    """A random global batch, with the tensors that the model's dataset gives."""
    return config.model.architecture.find("batch")(config, step)


def micro_batches(global_batch: Batch, size: int, mesh: Mesh) -> list[Batch]:
    """This data-parallel rank's micro-batches of the global batch, in order.

    The m-th micro-batches of all ranks are the samples from m x size x ranks on.
    """
    step, samples = size * mesh.data_size, len(global_batch["samples"])
    firsts = range(mesh.data_rank * size, samples, step)
    return [{name: value[first : first + size] for name, value in global_batch.items()} for first in firsts]


def forward_backward_once(runtime: Runtime, number: int = 0) -> float:
    """Compute the gradients of random batch `number` as training does; returns the sum of the losses."""
    config, mesh = runtime.config, runtime.mesh
    task = build_task(config, mesh)
    local = micro_batches(batch(config, number), config.batch.micro_batch_size, mesh)
    batches = [runtime.prepare_batch(data, task.sequences) for data in local]
    counts, sums = forward_backward(runtime, task, batches, number)
    return float(sums[: len(counts)].sum())


def measure(
    config: RunConfig, dtype: torch.dtype = torch.float32, extra: Callable[[Runtime], Any] | None = None
) -> LayoutResult:  # fmt: skip
    """One step of `config` on the ranks of the current process group; every rank must call.

    extra: called after the step; its value is in the result.
    """
    # torch warns that gathering a tensor split by two axes takes two collectives; a check can afford them.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    torch.manual_seed(0)
    runtime = build_runtime(config, meshes.init_mesh(config.parallel), dtype)
    draw_adapters(runtime)
    weights = {name: full_tensor(parameter) for name, parameter in runtime.named_parameters()}
    loss = forward_backward_once(runtime)
    named = [(name, parameter.grad) for name, parameter in runtime.named_parameters() if parameter.grad is not None]
    gradients = {name: full_tensor(gradient) for name, gradient in named}
    return LayoutResult(loss, weights, gradients, extra(runtime) if extra else None)


@torch.no_grad()
def draw_adapters(runtime: Runtime) -> None:
    """Draw every adapter's B, which begins as zeros, with which the gradient of A would be zero in any layout."""
    for name, parameter in runtime.named_parameters():
        if name.endswith(B):
            fill(parameter, "normal", 0.1, zlib.crc32(name.encode()))


def full_tensor(tensor: Tensor) -> Tensor:
    """A copy of a tensor's values, gathered where it is a DTensor."""
    detached = tensor.detach()
    return (detached.full_tensor() if isinstance(detached, DTensor) else detached).clone()


def compare(expected: LayoutResult, found: LayoutResult, dtype: torch.dtype) -> list[Difference]:
    """Loss, then every gradient, the worst first. A gradient that is missing on either side is infinitely wrong."""
    tolerance, total = TOLERANCE[dtype], expected.norm
    differences = []
    for name in expected.gradients.keys() | found.gradients.keys():
        true, other = expected.gradients.get(name), found.gradients.get(name)
        if true is None or other is None or true.shape != other.shape:
            differences.append(Difference(name, math.inf))
            continue
        norm = float(true.double().norm())
        scale = norm if norm > 0.1 * tolerance * total else total
        error = float((other.double() - true.double()).norm()) / scale
        differences.append(Difference(name, error if math.isfinite(error) else math.inf))
    worst_first = sorted(differences, key=lambda difference: -difference.error)
    return [Difference("loss", abs(found.loss - expected.loss) / abs(expected.loss)), *worst_first]
