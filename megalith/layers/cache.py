"""The interface of a cache of keys and values, for core attention; generation/cache.py has the one for generation.

A model takes it as an argument of `forward` and passes it on, and keeps nothing of it. Shapes: b rows, s tokens of
this call, n query heads, m key/value heads, d channels of a head.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from megalith.layers.mask import AttentionMask


class NeighborCache(Protocol):
    """The retrieved neighbours of texts that are written, for one call: what Retro's layers ask instead of a memory."""

    def encode(self, encoder: Any, text: Tensor) -> NeighborCache:
        """Take the hidden states of this call's tokens in the layer that encodes, and encode with them what has been
        found for the chunks that end in this call. text: [b, s, h].
        """

    def encoded(self) -> Tensor:
        """What has been encoded in this call, or received, of all rows: [chunks k, r, h]."""

    def receive(self, encoded: Tensor) -> None:
        """Take what an earlier pipeline stage has encoded in this call."""

    def attend(self, attention: Any, q: Tensor) -> Tensor:
        """The attention of q [b, s, n d] to each token's neighbours, 0 where it has none. attention: who asks."""


class Cache(Protocol):
    """Keys and values of earlier calls, for one more call.

    positions: int64 [b, s], the position of each token in its sequence. source_positions: those of the tokens that an
    encoder reads in this call, None where it reads none. length: the largest length of a sequence.
    neighbors: of a Retro, None where it reads none.
    """

    positions: Tensor
    source_positions: Tensor | None
    length: int
    neighbors: NeighborCache | None

    def attend(self, core: Any, q: Tensor, k: Tensor | None, v: Tensor | None, mask: AttentionMask) -> Tensor:
        """Store k, v [b, m, s, d] for the layer of `core`, and return the attention of q to all stored: [b, n, s, d].

        core: the CoreAttention that calls; `core.site` names its layer. k, v are None where a decoder attends to an
        encoder's output whose keys and values are stored already.
        """
