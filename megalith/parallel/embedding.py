"""Embeddings on the tensor-parallel axis. num_embeddings is that of the unsharded table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalith.parallel.collectives import Axis
from megalith.parallel.mappings import reduce_from_tensor_model_parallel_region
from megalith.parallel.sharding import shard_range, to_local


class ParallelEmbedding(nn.Embedding):
    """Base of the embeddings on the axis."""

    partial_gradients: tuple[str, ...] = ()

    def __init__(self, old: nn.Embedding, axis: Axis):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = old.num_embeddings, old.embedding_dim
        self.padding_idx = old.padding_idx
        self.weight, self.axis = old.weight, axis


class VocabParallelEmbedding(ParallelEmbedding):
    """Split by vocabulary: each rank looks up the ids it holds, and the sum over the ranks has them all."""

    def __init__(self, old: nn.Embedding, axis: Axis):
        super().__init__(old, axis)
        self.first, self.number = shard_range(old.num_embeddings, axis)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [b, s] -> [b, s, h], under sequence parallelism [b, s/t, h]."""
        self.axis.check_length(ids.shape[1])
        row = ids - self.first
        local = (row >= 0) & (row < self.number)
        padding = -1 if self.padding_idx is None else self.padding_idx - self.first  # its row has no gradient
        x = F.embedding(
            torch.where(local, row, 0), to_local(self.weight), padding if 0 <= padding < self.number else None
        )
        return reduce_from_tensor_model_parallel_region(torch.where(local[..., None], x, 0.0), self.axis)


class SequenceParallelEmbedding(ParallelEmbedding):
    """A replicated embedding; under sequence parallelism each rank looks up its shard of the sequence."""

    def __init__(self, old: nn.Embedding, axis: Axis):
        super().__init__(old, axis)
        self.partial_gradients = ("weight",) if axis.sequence_parallel else ()

    def forward(self, ids: Tensor) -> Tensor:
        """ids [b, s] -> [b, s, h] or [b, s/t, h]."""
        return F.embedding(self.axis.sequence_shard(ids), to_local(self.weight))


class ParallelRelativeBias(nn.Module):
    """A relative bias (layers/positions.py, RelativeBias), split by heads."""

    def __init__(self, old: nn.Module, axis: Axis):
        super().__init__()
        self.weight, self.buckets, self.sequence_shards, self.axis = old.weight, old.buckets, old.sequence_shards, axis

    def forward(self, length: int) -> Tensor:
        """As RelativeBias.forward, for this rank's heads."""
        return F.embedding(self.buckets(length * self.sequence_shards, self.weight.device), to_local(self.weight)).t()
