"""Norms that every rank of the tensor-parallel axis holds whole.

Under sequence parallelism each rank sees a part of the tokens, and a norm of single heads a part of the heads: their
gradients are partial.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megalith.parallel.collectives import Axis
from megalith.parallel.sharding import to_local


class LayerNorm(nn.LayerNorm):
    """torch's, with weights on the axis."""

    def __init__(self, old: nn.LayerNorm, axis: Axis, partial_gradients: tuple[str, ...]):
        nn.Module.__init__(self)
        self.normalized_shape, self.eps = old.normalized_shape, old.eps
        self.elementwise_affine = old.elementwise_affine
        self.weight, self.bias, self.axis, self.partial_gradients = old.weight, old.bias, axis, partial_gradients

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h] -> [..., h]."""
        return F.layer_norm(x, self.normalized_shape, to_local(self.weight), to_local(self.bias), self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's, with weights on the axis; one with a formula of its own has it as `compute` (layers/norm.py)."""

    def __init__(self, old: nn.RMSNorm, axis: Axis, partial_gradients: tuple[str, ...]):
        nn.Module.__init__(self)
        self.normalized_shape, self.eps = old.normalized_shape, old.eps
        self.elementwise_affine = old.elementwise_affine
        self.weight, self.axis, self.partial_gradients = old.weight, axis, partial_gradients
        self.compute = getattr(old, "compute", F.rms_norm)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h] -> [..., h]."""
        return self.compute(x, self.normalized_shape, to_local(self.weight), self.eps)
