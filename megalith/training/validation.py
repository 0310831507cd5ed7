"""The losses of a model on data it does not train on."""

from __future__ import annotations

import torch

from megalith.data.loader import Loader
from megalith.training.step import Trainer, global_counts, run


@torch.no_grad()
def evaluate(trainer: Trainer, loader: Loader, start: int, batches: int, global_batch_size: int) -> dict[str, float]:
    """Mean losses over `batches` global batches from sample `start` on, weighted as in training: by unmasked token.

    Equal on every process, and however many there are.
    """
    trainer.runtime.train(False)
    step = torch.zeros((), dtype=torch.int64, device=trainer.device)
    sums, totals = torch.zeros((), dtype=torch.float64, device=trainer.device), dict[str, torch.Tensor]()
    for number in range(batches):
        parts = [trainer.runtime.take(batch) for batch in loader.step(start + number * global_batch_size, global_batch_size)]
        counts = global_counts(trainer, parts)
        sums = sums + run(trainer, parts, counts, step, train=False) * torch.stack(list(counts.values())).double()
        for name, count in counts.items():
            totals[name] = totals.get(name, 0.0) + count.double()
    shared = trainer.runtime.mesh.share(sums)
    trainer.runtime.train()
    return {name: float(value / totals[name].clamp(min=1.0)) for name, value in zip(totals, shared, strict=True)}
