"""Linear layers on the tensor-parallel axis; in_features and out_features are those of the unsharded layer.

Parameters are DTensors, compute is on their local tensors (sharding.py); the products are those of matmul.py.

Local shapes: t ranks, m = b x s tokens, h input and n output features; X [m, ...] is [b, s, ...], and X [m/t, ...] a
shard of the sequence [b, s/t, ...]. Y = X W^T + bias. SP: under sequence parallelism. "->": a collective, all waited
for at once except those marked *, which overlap products (see below).

                       column-parallel                          row-parallel
    weight; bias       [n/t, h]; [n/t]                          [n, h/t]; [n], the same on all ranks
    forward            X [m, h], Y [m, n/t]                     X [m, h/t], Y [m, n] -> all-reduced [m, n]; + bias
      SP               X [m/t, h] -> all-gathered [m, h],       X [m, h/t], Y [m, n] -> reduce-scattered [m/t, n];
                       Y [m, n/t]                               + bias
    kept for backward  X [m, h]; SP: X [m/t, h]                 X [m, h/t]
    gradient of Y      dY [m, n/t]                              dY [m, n]
      SP               dY [m, n/t]                              dY [m/t, n] -> all-gathered [m, n]
    input gradient     dY W [m, h] -> all-reduced* [m, h]       dY W [m, h/t]
      SP               dY W [m, h] -> reduce-scattered*         dY W [m, h/t]
                       [m/t, h]
    weight gradient    dY^T X [n/t, h]                          dY^T X [n, h/t]
      SP               X [m/t, h] -> all-gathered again*        dY^T X [n, h/t]
                       [m, h], dY^T X [n/t, h]
    bias gradient      sum of dY over m: [n/t]                  sum of dY over m: [n], the same on all ranks
      SP               sum of dY over m: [n/t]                  sum of dY over m/t before its gather: [n], partial
                                                                -> all-reduced once a step (`partial_gradients`)

* Backward of a column-parallel layer: the second gather of X runs during dY W, and the collective of the input gradient
  during dY^T X. X is not gathered again where weight and bias are frozen. Where a sink (matmul.py) takes the weight and
  bias gradients, X is gathered when the sink has the weight's computed; nothing overlaps.
Several layers of one input (`SharedInput`) have these collectives once together: their input gradients are added first.
Where t does not divide n or h, the last ranks have less (sharding.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from megalith.parallel.collectives import Axis
from megalith.parallel.mappings import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megalith.parallel.matmul import Linear, layer_outputs
from megalith.parallel.sharding import to_local


class ParallelLinear(Linear):
    """Base of the linear layers on the axis.

    partial_gradients: names of parameters whose gradients are to be summed over the ranks, once a step (sharding.py).
    """

    partial_gradients: tuple[str, ...] = ()

    def __init__(self, old: nn.Linear, axis: Axis):
        super().__init__(old)
        self.axis = axis


class ColumnParallelLinear(ParallelLinear):
    """Split by outputs: rank r holds the r-th block of rows of the weight, and computes those columns of Y.

    X is the same on all ranks, under sequence parallelism gathered from its shards.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, h], under sequence parallelism [b, s/t, h] -> [b, s, out/t]."""
        return column_parallel_outputs(x, self.axis, [self])[0]


class KeyValueParallelLinear(ColumnParallelLinear):
    """Keys or values with fewer heads than ranks: the weight is replicated, each rank computes the one head it needs.

    Local shapes, collectives: those of a column-parallel layer whose n/t is head_dim. Weight and bias gradients have
    the whole layer's shape, zero outside this rank's head.
    """

    partial_gradients = ("weight", "bias")

    def __init__(self, old: nn.Linear, axis: Axis, head_dim: int):
        super().__init__(old, axis)
        heads = old.out_features // head_dim
        self.rows = (axis.rank * heads // axis.size * head_dim, head_dim)  # (first, number)

    def local_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The rows of this rank's head."""
        weight, bias = super().local_parameters()
        return weight.narrow(0, *self.rows), None if bias is None else bias.narrow(0, *self.rows)

    def local_adapter(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, and the rows of B and the magnitudes of this rank's head."""
        a, b, m = super().local_adapter()
        return a, b.narrow(0, *self.rows), None if m is None else m.narrow(0, *self.rows)


class RowParallelLinear(ParallelLinear):
    """Split by inputs: rank r holds the r-th block of columns of the weight, and has those columns of X.

    Y is all-reduced, under sequence parallelism reduce-scattered; then the bias, which is replicated, is added.
    """

    def __init__(self, old: nn.Linear, axis: Axis):
        super().__init__(old, axis)
        self.partial_gradients = ("bias",) if axis.sequence_parallel else ()

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, in/t] -> [b, s, out], under sequence parallelism [b, s/t, out]."""
        (partial,) = layer_outputs(x, [self], biased=False)
        y, bias = reduce_from_tensor_model_parallel_region(partial, self.axis), to_local(self.bias)
        return y if bias is None else y + bias


class ReplicatedLinear(ParallelLinear):
    """A linear layer with its whole weight on every rank."""

    def __init__(self, old: nn.Linear, axis: Axis, partial: bool):
        """partial: whether the ranks have different tokens as input, so that gradients are summed over the ranks."""
        super().__init__(old, axis)
        self.partial_gradients = ("weight", "bias") if partial else ()


class SharedInput(nn.Module):
    """Several column-parallel layers of one input, in place of layers/linear.py, SharedInput.

    Collectives are those of one column-parallel layer: the input is gathered once (and once again in the backward
    pass) under sequence parallelism, and one sum of input gradients serves all of the layers.
    """

    def __init__(self, axis: Axis):
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor, *layers: ColumnParallelLinear) -> tuple[Tensor, ...]:
        """x [b, s, h] or [b, s/t, h] -> one [b, s, out/t] of each layer."""
        return column_parallel_outputs(x, self.axis, layers)


def column_parallel_outputs(x: Tensor, axis: Axis, layers: Sequence[ColumnParallelLinear]) -> tuple[Tensor, ...]:
    """The outputs of several column-parallel layers of one input: shapes as `SharedInput.forward`."""
    return layer_outputs(x, layers, axis)


class CopyToTensorParallelRegion(nn.Module):
    """The input of many `SharedInputInRegion`s: an encoder's output, which every layer of a decoder reads.

    Under sequence parallelism it is gathered once; its gradient is summed once (all-reduced, or reduce-scattered).
    """

    def __init__(self, axis: Axis):
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, h] or [b, s/t, h] -> [b, s, h]."""
        return copy_to_tensor_model_parallel_region(x, self.axis)


class SharedInputInRegion(SharedInput):
    """Several column-parallel layers of an input that `CopyToTensorParallelRegion` has brought into the region.

    No collective: that module has gathered the input, and sums its gradient. The whole [m, h] is kept for the backward
    pass, not gathered again.
    """

    def forward(self, x: Tensor, *layers: ColumnParallelLinear) -> tuple[Tensor, ...]:
        """x [b, s, h] -> one [b, s, out/t] of each layer."""
        return layer_outputs(x, layers)
