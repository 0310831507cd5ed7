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
    return {"bert": _bert, "t5": _t5}.get(config.model.model_type, _gpt)(config, step)


def _gpt(config: RunConfig, step: int) -> Batch:
    """Random ids and labels, a tenth of the tokens masked, unevenly over the samples."""
    drawn = torch.Generator().manual_seed(config.batch.seed + step)
    shape = config.batch.global_batch_size, config.data.seq_length
    ids = torch.randint(config.model.vocab_size, (shape[0], shape[1] + 1), generator=drawn)
    seen = torch.rand(shape, generator=drawn) > torch.linspace(0.0, 0.2, shape[0])[:, None]
    samples = torch.arange(shape[0]) + step * shape[0]
    made = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "loss_mask": seen.float(), "samples": samples}
    if config.data.reset_attention_mask:
        made["documents"] = (ids[:, :-1] % 7 == 0).cumsum(dim=1)
    return made


def _t5(config: RunConfig, step: int) -> Batch:
    """What GPT has for the decoder; for the encoder random ids and lengths."""
    target = config.data.decoder_seq_length or config.data.seq_length
    made = _gpt(config.replace(seq_length=target), step)
    drawn = torch.Generator().manual_seed(config.batch.seed - 1 - step)
    b, s = shape = config.batch.global_batch_size, config.data.seq_length
    length = (s * (0.5 + 0.5 * torch.rand(b, 1, generator=drawn))).long()
    ids = torch.randint(config.model.vocab_size, shape, generator=drawn)
    return made | {"decoder_input_ids": made["input_ids"], "input_ids": ids, "padding_mask": (torch.arange(s) < length).long()}


def _bert(config: RunConfig, step: int) -> Batch:
    """Random ids, lengths, second segments and masked tokens, and with the binary head orders."""
    drawn = torch.Generator().manual_seed(config.batch.seed + step)
    b, s = shape = config.batch.global_batch_size, config.data.seq_length
    place, draw = torch.arange(s), torch.rand(b, 2, 1, generator=drawn)
    length = (s * (0.5 + 0.5 * draw[:, 0])).long()
    tokens, masked = place < length, torch.rand(shape, generator=drawn) < 0.3
    ids = torch.randint(config.model.vocab_size, (2, *shape), generator=drawn)
    made = {"input_ids": ids[0], "padding_mask": tokens.long(), "samples": torch.arange(b) + step * b}
    made |= {"labels": torch.where(masked & tokens, ids[1], -1), "loss_mask": (masked & tokens).float()}
    if not config.model.bert_no_binary_head:
        made |= {"token_types": (tokens & (place >= length * draw[:, 1])).long(), "sentence_order": torch.arange(b) % 3 % 2}
        made |= {"order_weights": torch.full((b,), 1.0 / b)}
    return made


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
