"""Sequence parallelism of modules other than layers, norms and embeddings; and how to switch it off for evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from megalith.parallel.collectives import Axis
from megalith.parallel.mappings import broadcast_from_first_rank


class FirstToken(nn.Module):
    """The first token of sequences of which each rank holds a shard. Every rank computes the same from it."""

    def __init__(self, axis: Axis):
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s/t, h] -> [b, h], the first rank's first token."""
        return broadcast_from_first_rank(x[:, 0], self.axis) if self.axis.sequence_parallel else x[:, 0]


class SequenceParallelDropout(nn.Module):
    """Dropout of this rank's shard of the sequence, by that shard of the dropout keys."""

    def __init__(self, dropout: nn.Module, axis: Axis):
        super().__init__()
        self.dropout, self.axis = dropout, axis

    def forward(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """x [b, s/t, h], dropout_keys [b, s]."""
        return self.dropout(x, None if dropout_keys is None else self.axis.sequence_shard(dropout_keys))


def sequence_axes(model: nn.Module) -> list[Axis]:
    """The axes along which modules of `model` shard sequences, each once."""
    found = (getattr(module, "axis", None) for module in model.modules())
    return list({id(axis): axis for axis in found if isinstance(axis, Axis) and axis.sequence_parallel}.values())


@contextlib.contextmanager
def unsharded_sequences(model: nn.Module | Sequence[Axis]) -> Iterator[None]:
    """Evaluate without sequence parallelism, so that any length works (generation). Not for training.

    model: or its `sequence_axes`, which cost a walk through all modules.
    """
    axes = sequence_axes(model) if isinstance(model, nn.Module) else model
    for axis in axes:
        axis.sequence_parallel = False
    try:
        yield
    finally:
        for axis in axes:
            axis.sequence_parallel = True
