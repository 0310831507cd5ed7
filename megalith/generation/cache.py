"""The memory for keys and values of sequences: a row for each, all allocated at once, and which request has which.

The cache is an argument of the model's `forward` (layers/cache.py); the model keeps no reference to it. How one call
appends to it and attends to it: cached_attention.py.
Slots and not pages: on a CPU the gathering of pages costs more than the attention itself, see docs/log.md.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megalith.layers.attention import CoreAttention, CrossAttention, SelfAttention

BLOCK = 64  # positions; rows are read in whole blocks, because accelerators' kernels want aligned masks


def round_up_to_block(positions: int) -> int:
    """`positions`, rounded up to whole blocks."""
    return -(-positions // BLOCK) * BLOCK


@dataclasses.dataclass
class LayerMemory:
    """Keys and values of one attention layer: [rows, kv_heads, length, head_dim].

    cross: whether they are those of an encoder's tokens, to which a decoder attends.
    """

    keys: Tensor
    values: Tensor
    cross: bool


class KVCache:
    """Keys and values of at most `rows` sequences. A sequence keeps its row, and the row its address, so that a
    compiled step and a CUDA graph find it.

    Layers are known by the `site` of their core attention, which holds the layer's number in the whole model: a
    pipeline stage has a cache of its layers, a tensor-parallel rank one of its key/value heads.
    """

    def __init__(
        self, stages: nn.Module | Sequence[nn.Module], rows: int, length: int, source_length: int = 0,
        kv_heads: int | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        """stages: the model, or the stages of it that this process runs. length: the most tokens of a sequence.

        source_length: the most tokens that an encoder reads. kv_heads: those of this process; None for all.
        dtype: of keys and values; None for that of the parameters.
        """
        stages = [stages] if isinstance(stages, nn.Module) else list(stages)
        c, parameter = stages[0].config, next(stages[0].parameters())
        self.rows, self.kv_heads, self.device = rows, kv_heads or c.num_kv_heads, parameter.device
        self.length, self.source_length = round_up_to_block(length), round_up_to_block(source_length)
        self.rows_of: dict[int, int] = {}  # request -> its row
        self.reserved: dict[int, tuple[int, int]] = {}  # request -> positions reserved, for itself and for its source
        self.free = deque(range(rows))  # the one that was freed last at the end
        self.filled = [0] * rows  # positions of each row that hold keys and values, from the start
        self.layers: dict[str, LayerMemory] = {}
        for attention in (each for stage in stages for each in cached_attentions(stage)):
            cross = isinstance(attention, CrossAttention)
            shape = (rows, self.kv_heads, self.source_length if cross else self.length, c.head_dim)
            # Zeros: 0 x NaN is NaN, also where it is masked. A tensor for each layer, because compiled steps write to
            # them, and torch.compile copies what it writes to where two share memory.
            keys, values = (torch.zeros(shape, dtype=dtype or parameter.dtype, device=self.device) for _ in range(2))
            for tensor in (keys, values):
                torch._dynamo.mark_static_address(tensor)  # otherwise CUDA graphs would copy it at each step
            self.layers[site(attention)] = LayerMemory(keys, values, cross)
        self.encoder_decoder = bool(c.decoder_layers)

    @property
    def bytes_per_row(self) -> int:
        """Memory of one row."""
        return self._bytes(self.length, self.source_length)

    @property
    def bytes_allocated(self) -> int:
        """Memory of all rows."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers.values())

    @property
    def bytes_in_use(self) -> int:
        """Memory of the positions that requests have reserved."""
        lengths = list(self.reserved.values())  # a copy, because a server asks from another thread
        return sum(self._bytes(*each) for each in lengths)

    def bytes_of(self, request: int) -> int:
        """Memory of the positions that one request has reserved."""
        return self._bytes(*self.reserved[request])

    def _bytes(self, length: int, source_length: int) -> int:
        return sum(
            2 * self.kv_heads * (source_length if layer.cross else length) * layer.keys.shape[-1] * layer.keys.itemsize
            for layer in self.layers.values()
        )

    def add(
        self, request: int, length: int, source_length: int = 0, row: int | None = None, kept: tuple[int, int] = (0, 0)
    ) -> int:  # fmt: skip
        """Reserve a row for so many tokens and return its number. A row must be free, and long enough.

        row: which free row; None for the one that has been free the longest. kept: how many positions that it holds,
        of itself and of its encoder's text, the request shares. The others are set to zero: masks hide what an earlier
        request left there, but they do not hide a NaN.
        """
        assert self.free and length <= self.length and source_length <= self.source_length
        row = self.free[0] if row is None else row
        self.free.remove(row)
        self.rows_of[request] = row
        self.reserved[request] = round_up_to_block(length), round_up_to_block(source_length)
        for tensor, cross in self._tensors():
            tensor[row, :, kept[cross] : self.reserved[request][cross]] = 0
        self.filled[row] = kept[0]
        return row

    def remove(self, request: int) -> int:
        """Free a request's row and return its number. What it holds stays until another request gets the row."""
        del self.reserved[request]
        row = self.rows_of.pop(request)
        self.free.append(row)
        return row

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row, and all of its encoder's, to another row."""
        for tensor, cross in self._tensors():
            used = self.source_length if cross else length
            tensor[target, :, :used] = tensor[source, :, :used]
        self.filled[target] = length

    def select(self, rows: Tensor, length: int, start: int = 0) -> None:
        """Copy these rows, int64 [any], to the first rows, `length` tokens of each; one may come twice (beams).

        start: the first so many tokens of all these rows are the same, and so is what the encoder read; only what comes
        after them is copied.
        """
        for tensor, cross in self._tensors():
            if cross and start:
                continue
            used = slice(self.source_length) if cross else slice(start, round_up_to_block(length))
            tensor[: len(rows), :, used] = tensor[rows, :, used]

    def _tensors(self) -> Iterator[tuple[Tensor, bool]]:
        for layer in self.layers.values():
            yield layer.keys, layer.cross
            yield layer.values, layer.cross


def cached_attentions(model: nn.Module) -> list[SelfAttention]:
    """The attentions that need earlier keys and values: all of a decoder's, none of an encoder's.

    Of a Retro self-attention alone: those of neighbours are elsewhere (retrieval/).
    """
    c, found = model.config, list[SelfAttention]()
    for number, layer in model.layers.items():
        if c.retrieval_layers:
            found.append(layer.attention)
        elif not c.decoder_layers or int(number) >= c.num_layers:
            found += [each for each in layer.modules() if isinstance(each, SelfAttention)]
    return found


def site(attention: SelfAttention) -> str:
    """The name by which a cache knows this attention."""
    return next(each.site for each in attention.core.modules() if isinstance(each, CoreAttention))
