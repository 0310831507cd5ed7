"""What core attention asks of a cache of keys and values; generation/cache.py has the one that text is written with.

A model takes it as an argument of `forward` and hands it down, and keeps nothing of it. Shapes: b rows, s tokens of
this call, n query heads, m key/value heads, d channels of a head.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from megalith.layers.mask import AttentionMask


class Cache(Protocol):
    """Keys and values of earlier calls, for one more call.

    positions: int64 [b, s], where each token stands in its sequence. source_positions: of the tokens that an encoder
    reads in this call, None where it reads none. length: no sequence has more places.
    """

    positions: Tensor
    source_positions: Tensor | None
    length: int

    def attend(self, core: Any, q: Tensor, k: Tensor | None, v: Tensor | None, mask: AttentionMask) -> Tensor:
        """Keep k, v [b, m, s, d] for the layer of `core`, and let q [b, n, s, d] see what it may of all that is kept:
        [b, n, s, d].

        core: the CoreAttention that asks; `core.site` names its layer. k, v are None where a decoder looks at an
        encoder's output, whose keys and values are kept already.
        """
