"""Dropout whose masks are a hash of (seed, step, sample, site, coordinate) and not a stream of draws.

Every layout, micro-batch size and recomputation therefore draws the same mask, and there is no state to save.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from megalith.layers.random import key, mix32


def row_keys(seed: int, step: Tensor, samples: Tensor, coordinates: Tensor) -> Tensor:
    """The part of the hash that sites share: int32 [b, s] from step [], samples [b] and coordinates [s] or [b, s].

    coordinates are places in the whole sequence, also where a rank holds a part of it. Step and samples are tensors
    because an integer would recompile a compiled model at each step.
    """
    words = step.to(samples.device).int() * 0x2545F491 + (key(seed, "dropout") & 0x7FFFFFFF)
    per_sample = mix32(mix32(samples.int() * 0x3C6EF372 + 1) ^ words)
    return mix32(per_sample[:, None] ^ (coordinates.int() * 0x1B873593 + 0x5BD1E995))


class Dropout(nn.Module):
    """Sets a share `p` of the last dimension's elements to zero and scales the rest by 1 / (1 - p).

    `site` names the place ("layers.3.mlp"): places in one model must differ or their masks are equal.
    `first_column` is the global number of column 0, for a rank that holds a part of the columns.
    """

    def __init__(self, p: float, site: str):
        super().__init__()
        self.p, self.first_column = p, 0
        # A tensor, because of an integer torch.compile makes a constant: each layer would be compiled anew, and the ninth refused.
        # On the CPU wherever the model is (a scalar goes to a kernel as its argument), and no buffer, which memory on meta would lose.
        self.site = torch.tensor(zlib.crc32(site.encode()) - (1 << 31), dtype=torch.int32, device="cpu")

    def forward(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """x [..., n], rows int32 [...] from `row_keys`, or None where nothing is dropped."""
        if rows is None or self.p == 0.0 or not self.training:
            return x
        columns = torch.arange(self.first_column, self.first_column + x.shape[-1], device=x.device, dtype=torch.int32)
        # Columns are mixed only together with rows. torch.compile's C++ has overflow of int32 undefined: of a product whose factors'
        # ranges the compiler knows, as those of a counter, it made masks in the gradients that were not those of the forward pass.
        drawn = mix32(mix32(rows ^ self.site)[..., None] ^ columns) & 0x7FFFFFFF
        return torch.where(drawn >= int(self.p * 2**31), x * (1.0 / (1.0 - self.p)), 0.0)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"p={self.p}"
