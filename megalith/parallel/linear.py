"""Linear layers whose weights lie on the tensor-parallel axis; in_features and out_features are the whole layer's.

State is DTensor, compute is on local tensors (sharding.py); the products are those of matmul.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from megalith.parallel.collectives import Axis
from megalith.parallel.mappings import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megalith.parallel.matmul import Linear, linear, linears
from megalith.parallel.sharding import to_local


class ParallelLinear(Linear):
    """What the linear layers on the axis share."""

    partial_gradients: tuple[str, ...] = ()

    def __init__(self, old: nn.Linear, axis: Axis):
        super().__init__(old)
        self.axis = axis

    def locals(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as plain tensors."""
        return to_local(self.weight), to_local(self.bias)


class ColumnParallelLinear(ParallelLinear):
    """Y = X A^T, A split by outputs: X whole (gathered under sequence parallelism), Y this rank's columns."""

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, h], under sequence parallelism [b, s/t, h] -> [b, s, out/t]."""
        return columns(x, self.axis, [self])[0]


class KeyValueParallelLinear(ColumnParallelLinear):
    """Keys or values with fewer heads than ranks: A is whole on every rank, which computes the one head it needs."""

    partial_gradients = ("weight", "bias")

    def __init__(self, old: nn.Linear, axis: Axis, head_dim: int):
        super().__init__(old, axis)
        heads = old.out_features // head_dim
        self.rows = (axis.rank * heads // axis.size * head_dim, head_dim)

    def locals(self) -> tuple[Tensor, Tensor | None]:
        """Rows of one head."""
        weight, bias = super().locals()
        return weight.narrow(0, *self.rows), None if bias is None else bias.narrow(0, *self.rows)


class RowParallelLinear(ParallelLinear):
    """Y = X A^T, A split by inputs: X this rank's columns, Y summed over the ranks (and split along the sequence)."""

    def __init__(self, old: nn.Linear, axis: Axis):
        super().__init__(old, axis)
        self.partial_gradients = ("bias",) if axis.sequence else ()

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, in/t] -> [b, s, out], under sequence parallelism [b, s/t, out]."""
        weight, bias = self.locals()
        y = reduce_from_tensor_model_parallel_region(linear(x, weight, None, self.matmul), self.axis)
        return y if bias is None else y + bias


class ReplicatedLinear(ParallelLinear):
    """Whole on every rank."""

    def __init__(self, old: nn.Linear, axis: Axis, partial: bool):
        """partial: whether the ranks see different tokens, so that each computes a part of the gradients."""
        super().__init__(old, axis)
        self.partial_gradients = ("weight", "bias") if partial else ()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear(x, *self.locals(), self.matmul)


class SharedInput(nn.Module):
    """Several column-parallel layers of one input: gathered once, one collective backward (see layers/linear.py)."""

    def __init__(self, axis: Axis):
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor, *layers: ColumnParallelLinear) -> tuple[Tensor, ...]:
        """x [b, s, h] or [b, s/t, h] -> one [b, s, out/t] of each layer."""
        return columns(x, self.axis, layers)


def columns(x: Tensor, axis: Axis, layers) -> tuple[Tensor, ...]:
    """The outputs of several column-parallel layers of one input."""
    weights, biases = zip(*(layer.locals() for layer in layers))
    return linears(x, weights, biases, layers[0].matmul, axis)


class CopyToRegion(nn.Module):
    """The input of many `RegionInput`s, gathered once, its gradient summed once: an encoder's output."""

    def __init__(self, axis: Axis):
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, h] or [b, s/t, h] -> [b, s, h]."""
        return copy_to_tensor_model_parallel_region(x, self.axis)


class RegionInput(SharedInput):
    """Several column-parallel layers of an input that `CopyToRegion` has fetched; it sums their gradients."""

    def forward(self, x: Tensor, *layers: ColumnParallelLinear) -> tuple[Tensor, ...]:
        """x [b, s, h] -> one [b, s, out/t] of each layer."""
        return tuple(linear(x, *layer.locals(), layer.matmul) for layer in layers)
