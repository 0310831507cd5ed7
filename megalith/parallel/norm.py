"""Norms that are replicated on the tensor-parallel axis.

Their gradients are partial where each rank sees other tokens (sequence parallelism) or other heads (a norm of each
query and key head).
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
    """torch's, with weights on the axis. A subclass with another formula has it as `compute` (layers/norm.py)."""

    def __init__(self, old: nn.RMSNorm, axis: Axis, partial_gradients: tuple[str, ...]):
        nn.Module.__init__(self)
        self.normalized_shape, self.eps = old.normalized_shape, old.eps
        self.elementwise_affine = old.elementwise_affine
        self.weight, self.axis, self.partial_gradients = old.weight, axis, partial_gradients
        self.compute = getattr(old, "compute", F.rms_norm)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h] -> [..., h]."""
        return self.compute(x, self.normalized_shape, to_local(self.weight), self.eps)
