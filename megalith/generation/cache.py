"""The memory for keys and values of sequences: a row for each, all allocated at once, and which request has which.

The cache is an argument of the model's `forward` (layers/cache.py); the model keeps no reference to it. How one call
appends to it and attends to it: cached_attention.py.
Slots and not pages: on a CPU the gathering of pages costs more than the attention itself, see docs/log.md.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megalith.layers.attention import CoreAttention, CrossAttention, SelfAttention

BLOCK = 64  # positions; rows are read in whole blocks, because accelerators' kernels want aligned masks


def round_up_to_block(positions: int) -> int:
    """`positions`, rounded up to whole blocks."""
    return -(-positions // BLOCK) * BLOCK


@dataclasses.dataclass
class LayerMemory:
    """Keys and values of one attention layer: two tensors [rows, kv_heads, length, head_dim]."""

    keys: Tensor
    values: Tensor


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
        attentions = [each for stage in stages for each in cached_attentions(stage)]
        # self attention, then cross attention, which holds the encoder's keys and values: [layers, rows, m, L, d]
        self.blocks: list[tuple[Tensor, Tensor]] = []
        self.layers: dict[str, LayerMemory] = {}
        for cross, positions in ((False, self.length), (True, self.source_length)):
            sites = [site(each) for each in attentions if isinstance(each, CrossAttention) == cross]
            shape = (len(sites), rows, self.kv_heads, positions, c.head_dim)
            # Zeros: 0 x NaN is NaN, also where it is masked.
            keys, values = (torch.zeros(shape, dtype=dtype or parameter.dtype, device=self.device) for _ in range(2))
            self.blocks.append((keys, values))
            for number, name in enumerate(sites):
                self.layers[name] = LayerMemory(keys[number], values[number])
                for tensor in (keys[number], values[number]):
                    torch._dynamo.mark_static_address(tensor)  # otherwise CUDA graphs would copy it at each step
        self.encoder_decoder = bool(c.decoder_layers)

    @property
    def bytes_per_row(self) -> int:
        """Memory of one row."""
        return self._bytes(self.length, self.source_length)

    @property
    def bytes_allocated(self) -> int:
        """Memory of all rows."""
        return sum(tensor.nbytes for pair in self.blocks for tensor in pair)

    @property
    def bytes_in_use(self) -> int:
        """Memory of the positions that requests have reserved."""
        return sum(map(self.bytes_of, self.reserved))

    def bytes_of(self, request: int) -> int:
        """Memory of the positions that one request has reserved."""
        return self._bytes(*self.reserved[request])

    def _bytes(self, length: int, source_length: int) -> int:
        return sum(
            2 * len(keys) * self.kv_heads * positions * keys.shape[-1] * keys.element_size()
            for (keys, _), positions in zip(self.blocks, (length, source_length))
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
        for pair, start, end in zip(self.blocks, kept, self.reserved[request]):
            for tensor in pair:
                tensor[:, row, :, start:end] = 0
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
        for (keys, values), used in zip(self.blocks, (length, self.source_length)):
            for tensor in (keys, values):
                tensor[:, target, :, :used] = tensor[:, source, :, :used]
        self.filled[target] = length

    def select(self, rows: Tensor, length: int) -> None:
        """Copy these rows, int64 [any], to the first rows, `length` tokens of each; one may come twice (beams)."""
        for (keys, values), used in zip(self.blocks, (round_up_to_block(length), self.source_length)):
            for tensor in (keys, values):
                tensor[:, : len(rows), :, :used] = tensor[:, rows, :, :used]


def cached_attentions(model: nn.Module) -> list[SelfAttention]:
    """The attentions that need earlier keys and values: all of a decoder's, none of an encoder's."""
    c, found = model.config, list[SelfAttention]()
    for number, layer in model.layers.items():
        if not c.decoder_layers or int(number) >= c.num_layers:
            found += [each for each in layer.modules() if isinstance(each, SelfAttention)]
    return found


def site(attention: SelfAttention) -> str:
    """The name by which a cache knows this attention."""
    return next(each.site for each in attention.core.modules() if isinstance(each, CoreAttention))
