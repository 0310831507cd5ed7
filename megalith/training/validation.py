"""The losses of a model on data it does not train on."""

from __future__ import annotations

import torch

from megalith.data.loader import Loader
from megalith.training.step import Trainer, forward, global_counts, to_device


@torch.no_grad()
def evaluate(trainer: Trainer, loader: Loader, start: int, batches: int, global_batch_size: int) -> dict[str, float]:
    """Mean losses over `batches` global batches from sample `start` on, weighted as in training: by unmasked token.

    Equal on every process, and however many there are.
    """
    trainer.runtime.model.eval()
    step = torch.zeros((), dtype=torch.int64, device=trainer.device)
    sums, totals = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for number in range(batches):
        parts = [to_device(batch, trainer.device) for batch in loader.step(start + number * global_batch_size, global_batch_size)]
        counts = global_counts(trainer, parts)
        for part in parts:
            for name, share in forward(trainer, part, counts, step).items():
                sums[name] = sums.get(name, 0.0) + share.double() * counts[name]
        for name, count in counts.items():
            totals[name] = totals.get(name, 0.0) + count.double()
    names = list(sums)
    shared = trainer.runtime.mesh.sum(torch.stack([sums[name] for name in names]))
    trainer.runtime.model.train()
    return {name: float(value / totals[name].clamp(min=1.0)) for name, value in zip(names, shared, strict=True)}
