"""Sequence parallelism: what sees a part of the sequence beside layers, norms and embeddings; how to do without."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from megalith.parallel.collectives import Axis
from megalith.parallel.mappings import broadcast_from_first_rank


class FirstToken(nn.Module):
    """The first token of sequences of which each rank holds a part. What follows is the same on all ranks."""

    def __init__(self, axis: Axis):
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s/t, h] -> [b, h], that of the first rank."""
        return broadcast_from_first_rank(x[:, 0], self.axis) if self.axis.sequence else x[:, 0]


class SequenceParallelDropout(nn.Module):
    """Dropout of this rank's part of the sequence, keyed by that part of `rows`."""

    def __init__(self, dropout: nn.Module, axis: Axis):
        super().__init__()
        self.dropout, self.axis = dropout, axis

    def forward(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """x [b, s/t, h], rows [b, s]."""
        return self.dropout(x, None if rows is None else self.axis.part(rows))


@contextlib.contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Evaluate with sequences whole on every rank, so that any length works (generation). Not for training."""
    found = (getattr(module, "axis", None) for module in model.modules())
    axes = {id(axis): axis for axis in found if isinstance(axis, Axis) and axis.sequence}
    for axis in axes.values():
        axis.sequence = False
    try:
        yield
    finally:
        for axis in axes.values():
            axis.sequence = True
