"""Is a layout right for a user's own data? Some training steps on it: masks, losses, gradients, and weights after."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megalith.config.adapters import A, B, M, is_adapter
from megalith.config.run import RunConfig
from megalith.parallel import mesh as meshes
from megalith.runtime.build import Runtime
from megalith.testing.parity import LayoutResult, draw_adapters, full_tensor
from megalith.training.build import build_loaders, open_datasets, open_tokenizer, trainer_from
from megalith.training.resume.start import read_weights
from megalith.training.resume.state import Progress
from megalith.training.step import train_step
from megalith.training.tasks import Batch, Task

STEPS = 2


@dataclasses.dataclass
class Steps:
    """One rank's result of some steps.

    steps: of each, its loss and gradients, as of one step; in the last the place of the gradients is taken by the
    weights after all steps, with the adapters merged into them. masks: {sample: its loss mask}, of each step, NaN where
    another context-parallel rank has the token.
    """

    steps: list[LayoutResult]
    masks: list[dict[int, Tensor]]


def measure_steps(config: RunConfig, dtype: torch.dtype = torch.float64, steps: int = STEPS) -> Steps:
    """The first steps of a run on its own training data, on the ranks of the current process group; every rank calls.

    config.model.vocab_size must be known. Adapters that would begin as zeros are drawn.
    """
    torch.manual_seed(0)
    mesh = meshes.init_mesh(config.parallel)
    tokenizer, _ = open_tokenizer(config)
    loader = build_loaders(config, mesh, open_datasets(config, mesh, tokenizer))["train"]
    trainer = trainer_from(read_weights(config), config, mesh, tokenizer, dtype)
    runtime = trainer.runtime
    if config.lora.adapter is None:
        draw_adapters(runtime)
    initial = {name: full_tensor(parameter) for name, parameter in runtime.named_parameters()}
    progress, found, masks = Progress(), list[LayoutResult](), list[dict[int, Tensor]]()
    batch = config.batch.global_batch_size or 1
    for number in range(steps):
        local = loader.step(number * batch, batch)
        masks.append(masks_of_rank(runtime, trainer.task, local))
        gradients: dict[str, Tensor] = {}

        def keep(gradients: dict[str, Tensor] = gradients) -> None:
            named = [(name, each.grad) for name, each in runtime.named_parameters() if each.grad is not None]
            gradients.update({name: full_tensor(gradient) for name, gradient in named})

        result = train_step(trainer, local, progress, before_optimizer_step=keep)
        found.append(LayoutResult(result.total_loss, initial if number == 0 else {}, gradients))
        progress.iteration += 1
        progress.consumed_train_samples += batch
        progress.scheduled_samples += batch
    loader.close()
    weights = {name: full_tensor(parameter) for name, parameter in runtime.named_parameters()}
    found.append(LayoutResult(found[-1].loss, {}, merged(weights, config.lora.scale if config.lora.lora_rank else 0.0)))
    return Steps(found, masks)


def masks_of_rank(runtime: Runtime, task: Task, batches: Sequence[Batch]) -> dict[int, Tensor]:
    """{sample: its loss mask} of micro-batches as a step on this rank has them, as `Steps` describes."""
    found: dict[int, Tensor] = {}
    for batch in batches:
        here, whole = runtime.prepare_batch(batch, task.sequences), batch["loss_mask"]
        masks = here["loss_mask"]
        if masks.shape != whole.shape:
            (places, *_) = (
                here[places] for name, places in task.sequences.items()
                if name in batch and batch[name].shape[-1] == whole.shape[-1]
            )  # fmt: skip
            masks = torch.full_like(whole, math.nan).index_copy(1, places, masks)
        found |= {int(number): mask for number, mask in zip(batch["samples"], masks)}
    return found


def merged(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Unsharded weights with the products of their adapters added, by name; adapters themselves are left out."""
    plain = {name: weight for name, weight in weights.items() if not is_adapter(name)}
    for name in weights:
        if name.endswith(A):
            module = name.removesuffix(A)
            weight = plain[f"{module}.weight"] + scale * weights[module + B] @ weights[name]
            if (magnitude := weights.get(module + M)) is not None:  # DoRA
                weight = torch.nn.functional.normalize(weight) * magnitude[:, None]
            plain[f"{module}.weight"] = weight
    return plain
