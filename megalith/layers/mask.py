"""What attention may see, as a small description instead of a matrix of s x s."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionMask(NamedTuple):
    """Which keys a query sees, and what is added to its scores.

    causal: keys after the query are hidden.
    documents: int [b, s], document of each token; keys of other documents are hidden.
    padding: bool [b, s], True for real tokens; other keys are hidden.
    slopes: float [heads], ALiBi: slope x (key place - query place) is added.
    window: keys more than window - 1 places before the query are hidden.
    rows: int32 [b, queries], dropout keys of the queries (layers/dropout.py), None where nothing is dropped.
    """

    causal: bool = True
    documents: Tensor | None = None
    padding: Tensor | None = None
    slopes: Tensor | None = None
    window: int | None = None
    rows: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether `causal` says it all, so that a fused kernel needs no bias."""
        return self.documents is None and self.padding is None and self.slopes is None and self.window is None

    def bias(self, queries: slice, keys: slice, device: torch.device) -> Tensor:
        """The scores' additive term for a block of places: float32, broadcastable to [b, heads, queries, keys]."""
        q = torch.arange(queries.start, queries.stop, device=device)[:, None]
        k = torch.arange(keys.start, keys.stop, device=device)[None, :]
        seen = (k <= q)[None, None] if self.causal else torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        if self.window is not None:
            seen = seen & (q - k < self.window)
        if self.documents is not None:
            seen = seen & (self.documents[:, None, queries, None] == self.documents[:, None, None, keys])
        if self.padding is not None:
            seen = seen & self.padding[:, None, None, keys]
        zero = torch.zeros((), device=device)
        distance = self.slopes.view(1, -1, 1, 1).float() * (k - q) if self.slopes is not None else zero
        return torch.where(seen, distance, float("-inf"))
