"""The key/value cache of sequences, and how one call of a model appends to it and attends to it.

The cache is an argument of the model's `forward` (layers/cache.py); the model keeps no reference to it. For each layer
one block of memory holds a row for every sequence, `length` positions long. Its address never changes, so that a
compiled step and a CUDA graph find it. The rows in use are the first ones: when a sequence ends, the last row in use
moves into its row.

Shapes: b rows, s tokens of this call, n query heads, m key/value heads, d channels of a head, L positions of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megalith.layers.attention import CoreAttention, CrossAttention, SelfAttention
from megalith.layers.mask import AttentionMask

BLOCK = 64  # positions; rows are read in whole blocks, because accelerators' kernels want aligned masks


def round_up_to_block(positions: int) -> int:
    """`positions`, rounded up to whole blocks."""
    return -(-positions // BLOCK) * BLOCK


class KVCache:
    """Memory for the keys and values of at most `rows` sequences, all allocated at once, and which request uses what.

    Layers are known by the `site` of their core attention, which holds the layer's number in the whole model: a
    pipeline stage has a cache of its layers, a tensor-parallel rank one of its key/value heads.
    """

    def __init__(self, model: nn.Module, rows: int, length: int, source_length: int = 0, kv_heads: int | None = None):
        """length: the most tokens of a sequence. source_length: the most tokens that an encoder reads.

        kv_heads: key/value heads of this process; None for all of them.
        """
        c, self.rows = model.config, rows
        self.length, self.source_length = round_up_to_block(length), round_up_to_block(source_length)
        self.keys: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.requests: list[int] = []  # the request of each row in use
        self.reserved: dict[int, tuple[int, int]] = {}  # request -> positions reserved, for itself and for its source
        self.cross: set[str] = set()  # the cross-attention layers, which hold the encoder's keys and values
        parameter = next(model.parameters())
        self.device, heads = parameter.device, kv_heads or c.num_kv_heads
        self.bytes_per_position = 2 * heads * c.head_dim * parameter.element_size()  # of one layer
        for attention in cached_attentions(model):
            name, cross = site(attention), isinstance(attention, CrossAttention)
            if cross:
                self.cross.add(name)
            shape = (rows, heads, self.source_length if cross else self.length, c.head_dim)
            for tensors in (self.keys, self.values):
                # Zeros: 0 x NaN is NaN, also where it is masked.
                tensors[name] = torch.zeros(shape, dtype=parameter.dtype, device=self.device)
                torch._dynamo.mark_static_address(tensors[name])  # otherwise CUDA graphs would copy it at each step

    @property
    def bytes_per_row(self) -> int:
        """Memory of one row."""
        return self._bytes(self.length, self.source_length)

    @property
    def bytes_allocated(self) -> int:
        """Memory of all rows."""
        return sum(tensor.nbytes for tensors in (self.keys, self.values) for tensor in tensors.values())

    @property
    def bytes_in_use(self) -> int:
        """Memory of the positions that requests have reserved."""
        return sum(map(self.bytes_of, self.requests))

    def bytes_of(self, request: int) -> int:
        """Memory of the positions that one request has reserved."""
        return self._bytes(*self.reserved[request])

    def _bytes(self, length: int, source_length: int) -> int:
        self_attentions = len(self.keys) - len(self.cross)
        return self.bytes_per_position * (self_attentions * length + len(self.cross) * source_length)

    def add(self, request: int, length: int, source_length: int = 0) -> int:
        """Reserve a row for so many tokens and return its number. A row must be free, and long enough.

        The row is set to zero: masks hide what an earlier request left there, but they do not hide a NaN.
        """
        assert len(self.requests) < self.rows and length <= self.length and source_length <= self.source_length
        self.reserved[request] = round_up_to_block(length), round_up_to_block(source_length)
        self.requests.append(request)
        row = len(self.requests) - 1
        for tensors in (self.keys, self.values):
            for name, tensor in tensors.items():
                tensor[row, :, : self.reserved[request][name in self.cross]] = 0
        return row

    def remove(self, request: int) -> int:
        """Free a request's row and return its number, which the last row in use now has, because it was moved there."""
        del self.reserved[request]
        row, last = self.requests.index(request), self.requests.pop()
        if last != request:
            self.requests[row] = last
            self._move(torch.tensor([len(self.requests)]), row, *self.reserved[last])
        return row

    def select(self, rows: Tensor, length: int, start: int = 0) -> None:
        """Copy these rows, int64 [any], to the first rows, `length` tokens of each; one may come twice (beams).

        start: the first so many tokens of all these rows are the same, and so is what the encoder read; only what comes
        after them is copied.
        """
        self._move(rows, 0, round_up_to_block(length), 0 if start else self.source_length, start)

    def _move(self, rows: Tensor, to: int, length: int, source_length: int, start: int = 0) -> None:
        for tensors in (self.keys, self.values):
            for name, tensor in tensors.items():
                used = slice(source_length) if name in self.cross else slice(start, length)
                tensor[to : to + len(rows), :, used] = tensor[rows, :, used]


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


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """Tokens to be read into a row, from position `start` on.

    source: the tokens that an encoder reads, with the first chunk.
    """

    row: int
    ids: Sequence[int]
    start: int = 0
    source: Sequence[int] = ()


class PrefillCache:
    """A call that reads chunks of several sequences, side by side: matrix products have all tokens and no padding.

    Attention is one call for each chunk, with that chunk's shape, to all of its sequence so far: the same as in
    training. pad, source_pad: padding tokens after the chunks; their attention is 0.
    """

    def __init__(self, cache: KVCache, chunks: Sequence[PrefillChunk], pad: int = 0, source_pad: int = 0):
        self.cache, self.chunks, self.length = cache, chunks, cache.length
        self.lengths = [*(len(chunk.ids) for chunk in chunks), pad]
        self.source_lengths = [*(len(chunk.source) for chunk in chunks), source_pad]
        starts, counts = [*(chunk.start for chunk in chunks), 0], zip(self.lengths, self.source_lengths)
        positions, source_positions = list[int](), list[int]()
        for start, (count, source_count) in zip(starts, counts):
            positions += range(start, start + count)
            source_positions += range(source_count)
        self.positions = torch.tensor([positions], device=cache.device)
        self.source_positions = torch.tensor([source_positions], device=cache.device) if source_positions else None

    def attend(self, core: CoreAttention, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """q [1, n, s, d]; k, v [1, m, s, d], or of an encoder's tokens -> [1, n, s, d]."""
        keys, values = self.cache.keys.get(core.site), self.cache.values.get(core.site)
        query_lengths = self.source_lengths if keys is None else self.lengths
        key_lengths = query_lengths if mask.causal else self.source_lengths
        outputs = []
        splits = q.split(query_lengths, 2), k.split(key_lengths, 2), v.split(key_lengths, 2)
        for chunk, chunk_q, chunk_k, chunk_v in zip(self.chunks, *splits):
            if keys is not None:
                start = 0 if not mask.causal else chunk.start
                end = start + chunk_k.shape[2]
                keys[chunk.row, :, start:end], values[chunk.row, :, start:end] = chunk_k[0], chunk_v[0]
                if start:
                    row = slice(chunk.row, chunk.row + 1)
                    chunk_k, chunk_v = keys[row, :, :end], values[row, :, :end]
            outputs.append(core(chunk_q, chunk_k, chunk_v, mask))
        return torch.cat([*outputs, q.new_zeros(1, q.shape[1], query_lengths[-1], q.shape[3])], dim=2)


class DecodeCache:
    """A call that appends a token to each of the first rows. All steps use one object, as a compiled step knows it.

    Neighbouring rows whose tokens fill the same number of blocks are one call of attention, to these blocks alone:
    what a row reads, and the order in which it is added up, depend on its own length only.
    """

    source_positions = None

    def __init__(self, cache: KVCache):
        self.cache, self.length, self.biases = cache, cache.length, dict[tuple, Tensor]()
        self.positions = self.sources = torch.zeros(0, dtype=torch.int64, device=cache.device)

    def begin(
        self, positions: Sequence[int], source_lengths: Sequence[int], pad: int = 0, fixed_shapes: bool = False,
        batch_invariant: bool = True,
    ) -> None:  # fmt: skip
        """Prepare a step.

        positions: of each row's new token. source_lengths: how many tokens each row's encoder has read. pad: padding
        tokens after the rows; their attention is 0. fixed_shapes: attend to whole rows, so that shapes are the same at
        every step. batch_invariant: see above; without it rows of equal length need no mask, because they attend only
        to the positions that they have filled.
        """
        self.rows = len(positions)
        self.positions = at_same_address(self.positions, [[position] for position in (*positions, *[0] * pad)])
        self.sources = at_same_address(self.sources, list(source_lengths))
        equal = len(set(positions)) == 1 and len(set(source_lengths)) <= 1
        self.filled = equal and not (fixed_shapes or batch_invariant)
        up = (lambda length: length) if self.filled else round_up_to_block
        self.spans = spans([self.length if fixed_shapes else up(position + 1) for position in positions])
        limit = self.cache.source_length
        self.source_spans = spans([limit if fixed_shapes else up(length) for length in source_lengths])
        self.biases.clear()

    def attend(
        self, core: CoreAttention, q: Tensor, k: Tensor | None, v: Tensor | None, mask: AttentionMask
    ) -> Tensor:  # fmt: skip
        """q [b, n, s, d]; k, v [b, m, s, d] or None -> [b, n, s, d]."""
        keys, values, outputs = self.cache.keys[core.site], self.cache.values[core.site], []
        if k is not None:
            if len(q) > self.rows:
                k, v = k[: self.rows], v[: self.rows]
            index = self.positions[: self.rows, None, :, None].expand_as(k)
            keys.scatter_(2, index, k)  # into the first rows
            values.scatter_(2, index, v)
        for first, last, length in self.spans if mask.causal else self.source_spans:
            rows = q[first:last]
            bias = None if self.filled and mask.needs_no_bias else self.bias(core, mask, first, last, length, q)
            count, heads, tokens, width = rows.shape
            # The query heads of a group become queries of its one key head: keys are read once and never repeated.
            kv_heads, group = keys.shape[1], heads // keys.shape[1]
            if bias is not None and (tokens > 1 or bias.shape[1] > 1):
                bias = bias.expand(-1, heads, -1, -1).reshape(count, kv_heads, group * tokens, -1)
            grouped = rows.reshape(count, kv_heads, group * tokens, width)
            cached = keys[first:last, :, :length], values[first:last, :, :length]
            out = scaled_dot_product_attention(grouped, *cached, attn_mask=bias, scale=core.scale)
            outputs.append(out.view(rows.shape))
        if len(q) > self.rows:
            outputs.append(q.new_zeros(len(q) - self.rows, *q.shape[1:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def bias(self, core: CoreAttention, mask: AttentionMask, first: int, last: int, length: int, q: Tensor) -> Tensor:
        """The bias added to the scores of these rows, [b, 1 or n, s, length]; one for all layers with the same mask."""
        kind = (mask.causal, mask.window, first)
        bias = self.biases.get(kind)
        if bias is None:
            bias = self._bias(core, mask, first, last, length, q)
            if not torch.compiler.is_compiling():  # a compiler finds common expressions by itself
                self.biases[kind] = bias
        return bias

    def _bias(self, core: CoreAttention, mask: AttentionMask, first: int, last: int, length: int, q: Tensor) -> Tensor:
        key, added = torch.arange(length, device=q.device), torch.zeros((), device=q.device)
        if mask.causal:
            distance = key - self.positions[first:last, None, :, None]  # [b, 1, s, length], 0 for the token itself
            hidden = distance > 0
            if mask.window is not None:
                hidden = hidden | (distance <= -mask.window)
            if mask.slopes is not None:
                added = core.local_slopes(mask.slopes, q.shape[1]).view(1, -1, 1, 1).float() * distance
            if mask.relative is not None:
                added = mask.relative[:, distance[:, 0] + mask.relative.shape[1] // 2].transpose(0, 1)
        else:
            hidden = key >= self.sources[first:last, None, None, None]
        wide = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else q.dtype
        return added.masked_fill(hidden, float("-inf")).to(wide)


def at_same_address(old: Tensor, values: list) -> Tensor:
    """An int64 tensor of these values: the old one where it has their shape, as a compiled step knows its address."""
    new = torch.tensor(values, dtype=torch.int64, device=old.device)
    return old.copy_(new) if new.shape == old.shape else new


def spans(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first, last + 1, length) of neighbours that are equally long."""
    found: list[tuple[int, int, int]] = []
    for index, length in enumerate(lengths):
        if found and found[-1][2] == length:
            found[-1] = (found[-1][0], index + 1, length)
        else:
            found.append((index, index + 1, length))
    return found
