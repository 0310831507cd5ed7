"""Is a layout right? Loss and every gradient of one step in it, against one process.

The judgement: norm of the difference over norm of the gradient, for each parameter by name (elementwise relative errors mean
nothing: reordering a sum alone gave 9 %). At most 1e-10 in float64, 1e-5 in float32. A parameter whose true gradient is zero,
as a key bias has, is judged against the norm of all gradients.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megalith.config.run import RunConfig
from megalith.parallel import mesh as meshes
from megalith.parallel.mesh import Mesh
from megalith.runtime.build import Runtime, place
from megalith.training.forward_backward import forward_backward
from megalith.training.tasks import build_task

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
Batch = dict[str, Tensor]


@dataclasses.dataclass
class Measured:
    """What one rank saw of a step: the loss of the global batch, initial weights and gradients, whole and by name."""

    loss: float
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    extra: Any = None  # what the caller's own function returned

    @property
    def norm(self) -> float:
        """Norm of all gradients."""
        return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in self.gradients.values()))


def merge(parts: list[Measured]) -> Measured:
    """What all ranks together saw: each pipeline stage has parameters of its own."""
    weights, gradients = {}, {}
    for part in reversed(parts):
        weights.update(part.weights)
        gradients.update(part.gradients)
    return dataclasses.replace(parts[0], weights=weights, gradients=gradients)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a quantity is from the one process's: `error` is relative, as the module's first lines say."""

    name: str
    error: float


def batch(config: RunConfig, step: int = 0) -> Batch:
    """A made-up global batch, as the model's dataset gives it."""
    return config.model.architecture.find("batch")(config, step)


def micro_batches(whole: Batch, size: int, mesh: Mesh) -> list[Batch]:
    """This data-parallel rank's micro-batches of the global batch, in order (the m-th: samples from m x size x ranks on)."""
    step, samples = size * mesh.data_size, len(whole["input_ids"])
    firsts = range(mesh.data_rank * size, samples, step)
    return [{name: value[first : first + size] for name, value in whole.items()} for first in firsts]


def one_pass(runtime: Runtime, number: int = 0) -> float:
    """Loss and gradients of made-up batch `number`, by the pass that training runs; returns the sum of the losses."""
    config, mesh = runtime.config, runtime.mesh
    task = build_task(config, mesh)
    made = micro_batches(batch(config, number), config.batch.micro_batch_size, mesh)
    batches = [runtime.take(data, task.sequences) for data in made]
    counts, sums = forward_backward(runtime, task, batches, number)
    return float(sums[: len(counts)].sum())


def measure(
    config: RunConfig, dtype: torch.dtype = torch.float32, extra: Callable[[Runtime], Any] | None = None
) -> Measured:  # fmt: skip
    """One step of `config` on the ranks of the current process group; every rank must call. extra: asked after the step."""
    # Reading a tensor that two axes split warns of two collectives, which a check can afford.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    torch.manual_seed(0)
    runtime = place(config, meshes.start(config.parallel), dtype)
    weights = {name: whole(parameter) for name, parameter in runtime.named_parameters()}
    loss = one_pass(runtime)
    named = [(name, parameter.grad) for name, parameter in runtime.named_parameters() if parameter.grad is not None]
    gradients = {name: whole(gradient) for name, gradient in named}
    return Measured(loss, weights, gradients, extra(runtime) if extra else None)


def whole(tensor: Tensor) -> Tensor:
    """A tensor's values, gathered where it is a DTensor."""
    detached = tensor.detach()
    return (detached.full_tensor() if isinstance(detached, DTensor) else detached).clone()


def compare(expected: Measured, found: Measured, dtype: torch.dtype) -> list[Difference]:
    """Loss, then every gradient, the worst first. A gradient that is missing on either side is infinitely wrong."""
    tolerance, total = TOLERANCE[dtype], expected.norm
    differences = []
    for name in expected.gradients.keys() | found.gradients.keys():
        one, other = expected.gradients.get(name), found.gradients.get(name)
        if one is None or other is None or one.shape != other.shape:
            differences.append(Difference(name, math.inf))
            continue
        size = float(one.double().norm())
        scale = size if size > 0.1 * tolerance * total else total
        error = float((other.double() - one.double()).norm()) / scale
        differences.append(Difference(name, error if math.isfinite(error) else math.inf))
    worst_first = sorted(differences, key=lambda difference: -difference.error)
    return [Difference("loss", abs(found.loss - expected.loss) / abs(expected.loss)), *worst_first]
