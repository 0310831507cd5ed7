"""Dropout whose masks are a hash of (seed, step, sample, site, coordinate) and not a stream of draws.

Every layout, micro-batch size and recomputation therefore draws the same mask, and there is no state to save.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from megalith.layers.random import key, mix32


def row_keys(seed: int, step: Tensor, samples: Tensor, coordinates: Tensor) -> Tensor:
    """The part of the hash that is the same at all sites: int32 [b, s].

    From step [], samples [b] and coordinates [s] or [b, s]. Coordinates are positions in the whole sequence, also where
    a rank holds a shard of it. Step and samples are tensors because an integer would recompile a compiled model at each
    step.
    """
    words = step.to(samples.device).int() * 0x2545F491 + (key(seed, "dropout") & 0x7FFFFFFF)
    per_sample = mix32(mix32(samples.int() * 0x3C6EF372 + 1) ^ words)
    return mix32(per_sample[:, None] ^ (coordinates.int() * 0x1B873593 + 0x5BD1E995))


class Dropout(nn.Module):
    """Sets a fraction `p` of the last dimension's elements to zero and scales the rest by 1 / (1 - p).

    `site` names where in the model it is ("layers.3.mlp"); sites of one model must differ or their masks are equal.
    `first_column` is the global number of column 0, for a rank that holds some of the columns.
    """

    def __init__(self, p: float, site: str):
        super().__init__()
        self.p, self.first_column = p, 0
        # A tensor, because torch.compile makes an integer a constant: each layer would be compiled anew, and the ninth
        # refused. On the CPU wherever the model is (a scalar is a kernel's argument), and no buffer, whose value would
        # be lost on meta.
        self.site = torch.tensor(zlib.crc32(site.encode()) - (1 << 31), dtype=torch.int32, device="cpu")

    def forward(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """x [..., n]; dropout_keys int32 [...] from `row_keys`, or None where nothing is dropped."""
        if dropout_keys is None or self.p == 0.0 or not self.training:
            return x
        columns = torch.arange(self.first_column, self.first_column + x.shape[-1], device=x.device, dtype=torch.int32)
        # Columns are mixed only together with the keys. In the C++ of torch.compile an overflow of int32 is undefined:
        # where the compiler knew the ranges of a product's factors, as those of a counter, the masks of the gradients
        # were not those of the forward pass.
        drawn = mix32(mix32(dropout_keys ^ self.site)[..., None] ^ columns) & 0x7FFFFFFF
        return torch.where(drawn >= int(self.p * 2**31), x * (1.0 / (1.0 - self.p)), 0.0)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"p={self.p}"
