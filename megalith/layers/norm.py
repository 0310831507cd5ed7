"""Norms of the residual stream, by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm1p(nn.RMSNorm):
    """RMSNorm whose weight is stored minus one (Gemma), so that weight decay pulls it to one and not to zero."""

    @staticmethod
    def compute(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float | None) -> Tensor:
        """As F.rms_norm, of weight + 1; in float32 at least, as bfloat16 would lose the weight beside the one."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), shape, 1 + weight.to(dtype), eps).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h] -> [..., h]."""
        return self.compute(x, self.normalized_shape, self.weight, self.eps)


NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm, "rmsnorm_1p": RMSNorm1p}
