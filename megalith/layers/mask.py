"""Which keys attention may see, as a small description instead of a matrix of s x s."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionMask(NamedTuple):
    """Which keys a query sees, and what is added to its scores.

    causal: keys after the query are hidden.
    documents: int [b, s], document of each token; keys of other documents are hidden.
    padding: bool [b, s], True for real tokens; other keys are hidden. A query that then sees no key, as padding before
        the first token, has an output of 0.
    slopes: float [heads], ALiBi: slope x (key position - query position) is added.
    relative: float [heads, 2 n - 1], a learned bias for at most n positions: column
        n - 1 + (key position - query position) is added.
    window: keys more than window - 1 positions before the query are hidden.
    dropout_keys: int32 [b, queries] of the queries (layers/dropout.py), None where nothing is dropped.
    """

    causal: bool = True
    documents: Tensor | None = None
    padding: Tensor | None = None
    slopes: Tensor | None = None
    relative: Tensor | None = None
    window: int | None = None
    dropout_keys: Tensor | None = None

    @property
    def needs_no_bias(self) -> bool:
        """Whether nothing but `causal` is set, so that a fused kernel needs no bias."""
        return all(each is None for each in (self.documents, self.padding, self.slopes, self.relative, self.window))

    def bias(self, queries: slice, keys: slice, device: torch.device) -> Tensor:
        """The term added to a block of scores: float32, broadcastable to [b, heads, queries, keys]."""
        q = torch.arange(queries.start, queries.stop, device=device)[:, None]
        k = torch.arange(keys.start, keys.stop, device=device)[None, :]
        visible = (k <= q)[None, None] if self.causal else torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        if self.window is not None:
            visible = visible & (q - k < self.window)
        if self.documents is not None:
            visible = visible & (self.documents[:, None, queries, None] == self.documents[:, None, None, keys])
        if self.padding is not None:
            visible = visible & self.padding[:, None, None, keys]
        zero = torch.zeros((), device=device)
        bias = self.slopes.view(1, -1, 1, 1).float() * (k - q) if self.slopes is not None else zero
        if self.relative is not None:
            bias = bias + self.relative_bias(queries, keys)
        return torch.where(visible, bias, float("-inf"))

    def relative_bias(self, queries: slice, keys: slice) -> Tensor:
        """`relative` for a block of scores, [heads, queries, keys]: each row is the next one moved by one column."""
        zero, count = self.relative.shape[1] // 2, keys.stop - keys.start
        columns = self.relative[:, zero + keys.start - queries.stop + 1 : zero + keys.stop - queries.start]
        return columns.unfold(1, count, 1).flip(1).to(torch.promote_types(columns.dtype, torch.float32))
