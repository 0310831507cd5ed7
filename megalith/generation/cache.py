"""The keys and values of what sequences have read, and how one call of a model adds to them and looks at them.

The cache is an argument of the model's `forward` (layers/cache.py); the model keeps nothing of it. One block of memory
for each layer holds a row for every sequence, `length` places long, at one address for all time, so that a compiled
step and a CUDA graph find it. The rows in use are the first ones: where one leaves, the last takes its place.

Shapes: b rows, s tokens of this call, n query heads, m key/value heads, d channels of a head, L places of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megalith.layers.attention import CoreAttention, CrossAttention, SelfAttention
from megalith.layers.mask import AttentionMask

BLOCK = 64  # rows are read in blocks of so many places: accelerators' kernels want aligned masks


def blocks(places: int) -> int:
    """`places`, rounded up to whole blocks."""
    return -(-places // BLOCK) * BLOCK


class KVCache:
    """Memory for the keys and values of at most `rows` sequences, all reserved at once, and who uses how much of it.

    Layers are known by the `site` of their core attention, which says the layer's number in the whole model: a
    pipeline stage has a cache of its layers, a tensor-parallel rank one of its key/value heads.
    """

    def __init__(self, model: nn.Module, rows: int, length: int, source_length: int = 0, kv_heads: int | None = None):
        """length: most places of a sequence. source_length: most that an encoder reads. kv_heads: of this process."""
        c, self.rows = model.config, rows
        self.length, self.source_length = blocks(length), blocks(source_length)
        self.keys: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.requests: list[int] = []  # whose the rows in use are, in their order
        self.reserved: dict[int, tuple[int, int]] = {}  # request -> places of its own, and of what its encoder reads
        self.cross: set[str] = set()  # the layers that hold what an encoder has read
        parameter = next(model.parameters())
        self.device, heads = parameter.device, kv_heads or c.num_kv_heads
        self.bytes_per_place = 2 * heads * c.head_dim * parameter.element_size()  # of one layer
        for attention in cached_attentions(model):
            name, cross = site(attention), isinstance(attention, CrossAttention)
            if cross:
                self.cross.add(name)
            shape = (rows, heads, self.source_length if cross else self.length, c.head_dim)
            for kept in (self.keys, self.values):
                # Zeros: 0 x NaN is NaN, also where it is masked.
                kept[name] = torch.zeros(shape, dtype=parameter.dtype, device=self.device)
                torch._dynamo.mark_static_address(kept[name])  # or CUDA graphs would copy it at each step

    @property
    def bytes_per_row(self) -> int:
        """Memory of one row."""
        return self._bytes(self.length, self.source_length)

    @property
    def bytes_allocated(self) -> int:
        """Memory of all rows."""
        return sum(each.nbytes for kept in (self.keys, self.values) for each in kept.values())

    @property
    def bytes_in_use(self) -> int:
        """Memory of the places that requests have reserved."""
        return sum(map(self.bytes_of, self.requests))

    def bytes_of(self, request: int) -> int:
        """Memory of the places that one request has reserved."""
        return self._bytes(*self.reserved[request])

    def _bytes(self, own: int, source: int) -> int:
        return self.bytes_per_place * ((len(self.keys) - len(self.cross)) * own + len(self.cross) * source)

    def add(self, request: int, places: int, source: int = 0) -> int:
        """Reserve a row for so many places; its number. There must be a free one, as long as that.

        It is empty: what an earlier request left would not be seen, but a NaN among it would.
        """
        assert len(self.requests) < self.rows and places <= self.length and source <= self.source_length
        self.reserved[request] = blocks(places), blocks(source)
        self.requests.append(request)
        row = len(self.requests) - 1
        for kept in (self.keys, self.values):
            for name, each in kept.items():
                each[row, :, : self.reserved[request][name in self.cross]] = 0
        return row

    def remove(self, request: int) -> int:
        """Give a row back; its number, which is now that of the last row, moved there."""
        del self.reserved[request]
        row, last = self.requests.index(request), self.requests.pop()
        if last != request:
            self.requests[row] = last
            self._move(torch.tensor([len(self.requests)]), row, *self.reserved[last])
        return row

    def select(self, rows: Tensor, places: int) -> None:
        """Make the first rows these ones, int64 [any], as far as they are filled; one may come twice (beams)."""
        self._move(rows, 0, blocks(places), self.source_length)

    def _move(self, rows: Tensor, to: int, own: int, source: int) -> None:
        for kept in (self.keys, self.values):
            for name, each in kept.items():
                used = (own, source)[name in self.cross]
                each[to : to + len(rows), :, :used] = each[rows, :, :used]


def cached_attentions(model: nn.Module) -> list[SelfAttention]:
    """Those that look at what came before: all of a decoder's, none of an encoder's."""
    c, found = model.config, list[SelfAttention]()
    for number, layer in model.layers.items():
        if not c.decoder_layers or int(number) >= c.num_layers:
            found += [each for each in layer.modules() if isinstance(each, SelfAttention)]
    return found


def site(attention: SelfAttention) -> str:
    """By what name a cache knows this attention."""
    return next(each.site for each in attention.core.modules() if isinstance(each, CoreAttention))


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens to be read, from place `start` of a row on. source: what an encoder reads, with the first."""

    row: int
    ids: Sequence[int]
    start: int = 0
    source: Sequence[int] = ()


class Prefill:
    """A call that reads pieces of several sequences, side by side: matrix products have all tokens and no padding.

    Attention is a call for each piece, of that piece's own shape, to all of its sequence so far: the same as in
    training. pad, source_pad: tokens after the pieces that are nobody's, whose attention is 0.
    """

    def __init__(self, cache: KVCache, pieces: Sequence[Piece], pad: int = 0, source_pad: int = 0):
        self.cache, self.pieces, self.length = cache, pieces, cache.length
        self.lengths = [*(len(piece.ids) for piece in pieces), pad]
        self.source_lengths = [*(len(piece.source) for piece in pieces), source_pad]
        starts, counts = [*(piece.start for piece in pieces), 0], zip(self.lengths, self.source_lengths)
        where, source = list[int](), list[int]()
        for start, (count, source_count) in zip(starts, counts):
            where += range(start, start + count)
            source += range(source_count)
        self.positions = torch.tensor([where], device=cache.device)
        self.source_positions = torch.tensor([source], device=cache.device) if source else None

    def attend(self, core: CoreAttention, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """q [1, n, s, d]; k, v [1, m, s, d], or of an encoder's tokens -> [1, n, s, d]."""
        keys, values = self.cache.keys.get(core.site), self.cache.values.get(core.site)
        own = self.source_lengths if keys is None else self.lengths
        seen = own if mask.causal else self.source_lengths
        made = []
        parts = q.split(own, 2), k.split(seen, 2), v.split(seen, 2)
        for piece, queries, more_keys, more_values in zip(self.pieces, *parts):
            if keys is not None:
                start = 0 if not mask.causal else piece.start
                end = start + more_keys.shape[2]
                keys[piece.row, :, start:end], values[piece.row, :, start:end] = more_keys[0], more_values[0]
                if start:
                    here = slice(piece.row, piece.row + 1)
                    more_keys, more_values = keys[here, :, :end], values[here, :, :end]
            made.append(core(queries, more_keys, more_values, mask))
        return torch.cat([*made, q.new_zeros(1, q.shape[1], own[-1], q.shape[3])], dim=2)


class Decode:
    """A call that appends a token to each of the first rows. One object for all steps, as a compiled step knows it.

    Neighbouring rows whose filled places make the same number of blocks are one call of attention, to these blocks
    alone: what a row reads, and the order in which it is added up, depend on its own length only.
    """

    source_positions = None

    def __init__(self, cache: KVCache):
        self.cache, self.length, self.biases = cache, cache.length, dict[tuple, Tensor]()
        self.positions = self.sources = torch.zeros(0, dtype=torch.int64, device=cache.device)

    def begin(
        self, positions: Sequence[int], sources: Sequence[int], pad: int = 0, whole: bool = False, exact: bool = True
    ) -> None:  # fmt: skip
        """Make ready for a step.

        positions: where each row's new token will stand. sources: how many tokens each row's encoder has read. pad:
        tokens after the rows that are nobody's, whose attention is 0. whole: look at whole rows, so that shapes are
        the same at every step. exact: see above; else rows that are equally long need no mask, as they look at the
        places alone that they have filled.
        """
        self.rows = len(positions)
        self.positions = at_same_address(self.positions, [[place] for place in (*positions, *[0] * pad)])
        self.sources = at_same_address(self.sources, list(sources))
        self.filled = not (whole or exact) and len(set(positions)) == 1 and len(set(sources)) <= 1
        up = (lambda places: places) if self.filled else blocks
        self.spans = spans([self.length if whole else up(place + 1) for place in positions])
        limit = self.cache.source_length
        self.source_spans = spans([limit if whole else up(number) for number in sources])
        self.biases.clear()

    def attend(
        self, core: CoreAttention, q: Tensor, k: Tensor | None, v: Tensor | None, mask: AttentionMask
    ) -> Tensor:  # fmt: skip
        """q [b, n, s, d]; k, v [b, m, s, d] or None -> [b, n, s, d]."""
        keys, values, made = self.cache.keys[core.site], self.cache.values[core.site], []
        if k is not None:
            if len(q) > self.rows:
                k, v = k[: self.rows], v[: self.rows]
            at = self.positions[: self.rows, None, :, None].expand_as(k)
            keys.scatter_(2, at, k)  # into the first rows
            values.scatter_(2, at, v)
        for first, last, length in self.spans if mask.causal else self.source_spans:
            rows = q[first:last]
            bias = None if self.filled and mask.plain else self.bias(core, mask, first, last, length, q)
            count, heads, tokens, width = rows.shape
            # The query heads of a group become queries of its one key head: keys are read once and never repeated.
            kv_heads, group = keys.shape[1], heads // keys.shape[1]
            if bias is not None and (tokens > 1 or bias.shape[1] > 1):
                bias = bias.expand(-1, heads, -1, -1).reshape(count, kv_heads, group * tokens, -1)
            grouped = rows.reshape(count, kv_heads, group * tokens, width)
            look = keys[first:last, :, :length], values[first:last, :, :length]
            out = scaled_dot_product_attention(grouped, *look, attn_mask=bias, scale=core.scale)
            made.append(out.view(rows.shape))
        if len(q) > self.rows:
            made.append(q.new_zeros(len(q) - self.rows, *q.shape[1:]))
        return made[0] if len(made) == 1 else torch.cat(made)

    def bias(self, core: CoreAttention, mask: AttentionMask, first: int, last: int, length: int, q: Tensor) -> Tensor:
        """What is added to the scores of these rows: [b, 1 or n, s, length], made once for all layers of one kind."""
        kind = (mask.causal, mask.window, first)
        made = self.biases.get(kind)
        if made is None:
            made = self._bias(core, mask, first, last, length, q)
            if not torch.compiler.is_compiling():  # a compiler finds by itself what is the same
                self.biases[kind] = made
        return made

    def _bias(self, core: CoreAttention, mask: AttentionMask, first: int, last: int, length: int, q: Tensor) -> Tensor:
        key, added = torch.arange(length, device=q.device), torch.zeros((), device=q.device)
        if mask.causal:
            distance = key - self.positions[first:last, None, :, None]  # [b, 1, s, length], 0 for the token itself
            hidden = distance > 0
            if mask.window is not None:
                hidden = hidden | (distance <= -mask.window)
            if mask.slopes is not None:
                added = core.slopes_here(mask.slopes, q.shape[1]).view(1, -1, 1, 1).float() * distance
            if mask.relative is not None:
                added = mask.relative[:, distance[:, 0] + mask.relative.shape[1] // 2].transpose(0, 1)
        else:
            hidden = key >= self.sources[first:last, None, None, None]
        wide = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else q.dtype
        return added.masked_fill(hidden, float("-inf")).to(wide)


def at_same_address(old: Tensor, values: list) -> Tensor:
    """A tensor int64 of these values: the old one where it has their shape, as a compiled step knows it."""
    new = torch.tensor(values, dtype=torch.int64, device=old.device)
    return old.copy_(new) if new.shape == old.shape else new


def spans(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first, last + 1, length) of neighbours that are equally long."""
    made: list[tuple[int, int, int]] = []
    for at, length in enumerate(lengths):
        if made and made[-1][2] == length:
            made[-1] = (made[-1][0], at + 1, length)
        else:
            made.append((at, at + 1, length))
    return made
