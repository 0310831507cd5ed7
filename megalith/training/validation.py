"""The losses of a model on data it does not train on."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from megalith.data.loader import Loader
from megalith.training.step import Trainer, asked, asking, global_counts, run


class Unmeasured(Exception):
    """A validation that ended before its end, on every process: asked to, for a `reason`, or because data could not be read."""

    def __init__(self, message: str, reason: str | None = None):
        super().__init__(message)
        self.reason = reason


@torch.no_grad()
def evaluate(
    trainer: Trainer, loader: Loader, start: int, batches: int, global_batch_size: int, stop: Callable[[], str | None] = lambda: None
) -> dict[str, float]:
    """Mean losses over `batches` global batches from sample `start` on, weighted as in training: by unmasked token.

    Equal on every process, and however many there are. A loss that no token counts for is not a number.
    stop: why this process asks that the run end, if it does; asked before every batch. Raises Unmeasured on all processes where
    any gives a reason, or cannot read its part of a batch.
    """
    trainer.runtime.train(False)
    step = torch.zeros((), dtype=torch.int64, device=trainer.device)
    sums, totals = torch.zeros((), dtype=torch.float64, device=trainer.device), dict[str, torch.Tensor]()
    for number in range(batches):
        micro_batches = read(trainer, loader, start + number * global_batch_size, global_batch_size, stop())
        parts = [trainer.runtime.take(batch) for batch in micro_batches]
        counts = global_counts(trainer, parts)
        sums = sums + run(trainer, parts, counts, step, train=False) * torch.stack(list(counts.values())).double()
        for name, count in counts.items():
            totals[name] = totals.get(name, 0.0) + count.double()
    shared = trainer.runtime.mesh.share(sums)
    trainer.runtime.train()
    for name in [name for name, total in totals.items() if float(total) == 0.0 and trainer.runtime.mesh.is_main]:
        print(f"megalith: no token of {batches * global_batch_size} samples counts for the {name} (all are masked): it is not a number",
              file=sys.stderr, flush=True)  # fmt: skip
    return {name: float(value / totals[name]) for name, value in zip(totals, shared, strict=True)}


def read(trainer: Trainer, loader: Loader, start: int, size: int, reason: str | None) -> list[dict[str, torch.Tensor]]:
    """This process's micro-batches of a batch, where all processes could read theirs and none has a reason to stop."""
    batches, failure = list[dict[str, torch.Tensor]](), ""
    if reason is None:
        try:
            batches = loader.step(start, size)
        except Exception as error:
            failure = f"samples {start} to {start + size - 1}: {type(error).__name__}: {error}"
            print(f"megalith: validation data could not be read, {failure}", file=sys.stderr, flush=True)
    flags = torch.tensor([*asking(reason), float(bool(failure))], dtype=torch.float32, device=trainer.device)
    *reasons, failed = trainer.runtime.mesh.share(flags).tolist()
    if reason := asked(reasons):
        raise Unmeasured(reason, reason)
    if failed:
        raise Unmeasured(failure or f"another process could not read its part of samples {start} to {start + size - 1}")
    return batches
