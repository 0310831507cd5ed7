"""Output layer and loss of a vocabulary that is split over the tensor-parallel axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.common.errors import ConfigError, problem
from megalith.parallel.collectives import Axis, start_all_reduce, start_all_reduce_max, wait
from megalith.parallel.linear import ColumnParallelLinear
from megalith.parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_tensor_model_parallel_region
from megalith.parallel.sharding import shard_range, to_local


class ParallelLMHead(ColumnParallelLinear):
    """The output layer, split by vocabulary, its bias replicated. Calling it returns all logits."""

    partial_gradients = ("bias",)

    def local_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of this rank's part of the vocabulary."""
        weight, bias = super().local_parameters()
        return weight, None if bias is None else bias.narrow(0, *shard_range(self.out_features, self.axis))

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, h] -> logits [b, s, V]."""
        y, step = super().forward(x), -(-self.out_features // self.axis.size)
        padded = F.pad(y, (0, step - y.shape[-1]))
        return gather_from_tensor_model_parallel_region(padded, self.axis)[..., : self.out_features]


class ParallelVocabulary:
    """This rank's rows of the vocabulary, for the loss; layers/loss.py, Vocabulary, documents the methods."""

    block = None  # each block would cost two collectives

    def __init__(self, axis: Axis, size: int):
        self.axis, (self.first, self.number) = axis, shard_range(size, axis)
        if self.number == 0:
            rule = f"must leave each of {axis.size} tensor-parallel ranks a row"
            raise ConfigError(problem("vocab_size", size, rule, "Lower --tensor-model-parallel-size"))

    def copy_hidden(self, hidden: Tensor) -> Tensor:
        return copy_to_tensor_model_parallel_region(hidden, self.axis)

    def local_rows(self, weight: Tensor) -> Tensor:
        local = to_local(weight)  # a bias is replicated
        return local if len(local) == self.number else local.narrow(0, self.first, self.number)

    def local_labels(self, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        row = labels - self.first
        local = (row >= 0) & (row < rows) & (labels >= 0)
        return torch.where(local, row, 0), local

    def all_reduce_max(self, values: Tensor) -> Tensor:
        return wait(start_all_reduce_max(values, self.axis.group))

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return wait(start_all_reduce(values, self.axis.group))
