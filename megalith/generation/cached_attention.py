"""How one call of a model appends to the cache (cache.py) and attends to it; see layers/cache.py for the interface.

Shapes: b rows, s tokens of this call, n query heads, m key/value heads, d channels of a head, L positions of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megalith.generation.cache import KVCache, round_up_to_block
from megalith.layers.attention import CoreAttention
from megalith.layers.mask import AttentionMask

Span: TypeAlias = tuple[int, int, int, int]  # rows of one length: the first, the last + 1, the first's row, the length


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """Tokens to be read into a row, from position `start` on.

    source: the tokens that an encoder reads, with the first chunk. keep: of how many of its last tokens logits are
    wanted.
    """

    row: int
    ids: Sequence[int]
    start: int = 0
    source: Sequence[int] = ()
    keep: int = 1


class PrefillCache:
    """A call that reads chunks of several sequences, side by side: matrix products have all tokens and no padding.

    Attention is one call for each chunk, with that chunk's shape, to all of its sequence so far: the same as in
    training. pad, source_pad: padding tokens after the chunks; their attention is 0.
    """

    neighbors = None

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
        memory = self.cache.layers.get(core.site)  # None in an encoder, which keeps nothing
        query_lengths = self.source_lengths if memory is None else self.lengths
        key_lengths = query_lengths if mask.causal else self.source_lengths
        outputs = []
        splits = q.split(query_lengths, 2), k.split(key_lengths, 2), v.split(key_lengths, 2)
        for chunk, chunk_q, chunk_k, chunk_v in zip(self.chunks, *splits):
            if memory is not None:
                start = 0 if not mask.causal else chunk.start
                end = start + chunk_k.shape[2]
                memory.keys[chunk.row, :, start:end] = chunk_k[0]
                memory.values[chunk.row, :, start:end] = chunk_v[0]
                if start:
                    row = slice(chunk.row, chunk.row + 1)
                    chunk_k, chunk_v = memory.keys[row, :, :end], memory.values[row, :, :end]
            outputs.append(core(chunk_q, chunk_k, chunk_v, mask))
        if query_lengths[-1]:
            outputs.append(q.new_zeros(1, q.shape[1], query_lengths[-1], q.shape[3]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


class DecodeCache:
    """A call that appends a token to some of the rows. All steps use one object, as a compiled step knows it.

    Neighbouring rows whose tokens fill the same number of blocks are one call of attention, to these blocks alone:
    what a row reads, and the order in which it is added up, depend on its own length only.
    """

    source_positions = None
    neighbors = None

    def __init__(self, cache: KVCache, *, batch_invariant: bool = True, compiled: bool = False):
        """batch_invariant: see above; without it rows of equal length need no mask, because they attend only to the
        positions that they have filled.

        compiled: the same shapes at every step of as many rows. On accelerators, whose graphs cannot read lengths,
        attention is to whole rows; on CPUs it is one operator, opaque to the compiler, that reads them.
        """
        self.cache, self.length, self.compiled = cache, cache.length, compiled
        self.whole_rows = compiled and cache.device.type != "cpu"
        self.opaque = compiled and not self.whole_rows
        self.loose = not (batch_invariant or self.whole_rows or (compiled and cache.rows > 1))
        self.filled, self.biases = False, dict[tuple, Tensor]()
        self.positions = self.slots = self.sources = torch.zeros(0, dtype=torch.int64, device=cache.device)
        self.spans: list[Span] = []
        self.source_spans: list[Span] = []
        self.span_tensors = self.positions, self.positions  # the spans of both, padded, for the opaque operator

    def begin(
        self, rows: Sequence[int], positions: Sequence[int], source_lengths: Sequence[int] = (), pad: int = 0
    ) -> None:  # fmt: skip
        """Prepare a step.

        rows: ascending, those that get a token. positions: of each row's new token. source_lengths: how many tokens
        each row's encoder has read. pad: padding tokens after the rows; their attention is 0.
        """
        cache = self.cache
        self.positions = at_same_address(self.positions, [[position] for position in (*positions, *[0] * pad)])
        self.sources = at_same_address(self.sources, [*source_lengths, *[0] * pad])
        slots = [
            (row * cache.kv_heads + head) * cache.length + position
            for row, position in zip(rows, positions)
            for head in range(cache.kv_heads)
        ]
        unused = pad * cache.kv_heads if self.opaque else 0
        self.slots = at_same_address(self.slots, slots + [0] * unused)  # in [rows x m x L, d]
        self.filled = self.loose and len(set(positions)) == 1 and len(set(source_lengths)) <= 1
        up = (lambda length: length) if self.filled else round_up_to_block
        self.spans = spans(rows, [self.length if self.whole_rows else up(position + 1) for position in positions])
        limit = cache.source_length
        self.source_spans = spans(rows, [limit if self.whole_rows else up(length) for length in source_lengths])
        if self.opaque:
            self.span_tensors = tuple(
                at_same_address(old, [*new, *[(0, 0, 0, 0)] * (len(rows) + pad - len(new))])
                for old, new in zip(self.span_tensors, (self.spans, self.source_spans))
            )
        self.biases.clear()

    def attend(
        self, core: CoreAttention, q: Tensor, k: Tensor | None, v: Tensor | None, mask: AttentionMask
    ) -> Tensor:  # fmt: skip
        """q [b, n, 1, d]; k, v [b, m, 1, d] or None -> [b, n, 1, d]."""
        memory = self.cache.layers[core.site]
        bias = None if self.filled and mask.needs_no_bias else self.bias(core, mask, q)
        scale = core.scale or q.shape[-1] ** -0.5
        arguments = (q, k, v, memory.keys, memory.values, self.slots)
        if self.opaque:
            return torch.ops.megalith.attend_rows(*arguments, self.span_tensors[not mask.causal], bias, scale)
        return _attend_rows(*arguments, self.spans if mask.causal else self.source_spans, bias, scale)

    def bias(self, core: CoreAttention, mask: AttentionMask, q: Tensor) -> Tensor:
        """The bias added to the scores, [b, 1 or n, 1, longest row]; one for all layers with the same mask."""
        kind = (mask.causal, mask.window)
        bias = self.biases.get(kind)
        if bias is None:
            bias = self._bias(core, mask, q)
            if not torch.compiler.is_compiling():  # a compiler finds common expressions by itself
                self.biases[kind] = bias
        return bias

    def _bias(self, core: CoreAttention, mask: AttentionMask, q: Tensor) -> Tensor:
        longest = self.length if mask.causal else self.cache.source_length
        if not self.compiled:
            longest = max(span[3] for span in (self.spans if mask.causal else self.source_spans))
        key, added = torch.arange(longest, device=q.device), torch.zeros((), device=q.device)
        if mask.causal:
            distance = key - self.positions[:, None, :, None]  # [b, 1, 1, longest], 0 for the token itself
            hidden = distance > 0
            if mask.window is not None:
                hidden = hidden | (distance <= -mask.window)
            if mask.slopes is not None:
                added = core.local_slopes(mask.slopes, q.shape[1]).view(1, -1, 1, 1).float() * distance
            if mask.relative is not None:
                added = mask.relative[:, distance[:, 0] + mask.relative.shape[1] // 2].transpose(0, 1)
        else:
            hidden = key >= self.sources[:, None, None, None]
        wide = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else q.dtype
        return added.masked_fill(hidden, float("-inf")).to(wide)


def _attend_rows(
    q: Tensor, k: Tensor | None, v: Tensor | None, keys: Tensor, values: Tensor, slots: Tensor, spans: Sequence[Span],
    bias: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Write k, v [b, m, 1, d] to their slots of keys, values [rows, m, L, d]; the attention of q [b, n, 1, d] to spans.

    Rows of q that are in no span are padding.
    """
    count, heads, width, kv_heads = spans[-1][1], q.shape[1], q.shape[3], keys.shape[1]
    if k is not None and v is not None:
        slots = slots[: count * kv_heads]
        keys.view(-1, width).index_copy_(0, slots, k[:count].reshape(-1, width))
        values.view(-1, width).index_copy_(0, slots, v[:count].reshape(-1, width))
    # The query heads of a group become queries of its one key head: keys are read once and never repeated.
    grouped, outputs = q.reshape(-1, kv_heads, heads // kv_heads, width), []
    for first, last, row, length in spans:
        end, mask = row + last - first, None
        if bias is not None:
            mask = bias[first:last, :, :, :length]
            if bias.shape[1] > 1:
                mask = mask.reshape(last - first, kv_heads, heads // kv_heads, length)
        outputs.append(
            scaled_dot_product_attention(
                grouped[first:last], keys[row:end, :, :length], values[row:end, :, :length], attn_mask=mask, scale=scale
            )
        )
    if grouped.shape[0] > count:
        outputs.append(grouped.new_zeros(grouped.shape[0] - count, *grouped.shape[1:]))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).reshape(q.shape)


def _attend_rows_by_tensor(
    q: Tensor, k: Tensor | None, v: Tensor | None, keys: Tensor, values: Tensor, slots: Tensor, spans: Tensor,
    bias: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """`_attend_rows`; spans: int64 [any, 4], padded with zeros."""
    return _attend_rows(
        q, k, v, keys, values, slots, [span for span in spans.tolist() if span[1]], bias, scale
    ).contiguous()


# An operator that torch.compile does not look into. Not torch.library.custom_op, whose wrappers take 80 us a call.
_library = torch.library.Library("megalith", "DEF")
_library.define(
    "attend_rows(Tensor q, Tensor? k, Tensor? v, Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor spans, "
    "Tensor? bias, float scale) -> Tensor"
)
_library.impl("attend_rows", _attend_rows_by_tensor, "CompositeExplicitAutograd")


@torch.library.register_fake("megalith::attend_rows", lib=_library)
def _(q: Tensor, *others: object) -> Tensor:
    return q.new_empty(q.shape)


def at_same_address(old: Tensor, values: list) -> Tensor:
    """An int64 tensor of these values: the old one where it has their shape, as a compiled step knows its address."""
    new = torch.tensor(values, dtype=torch.int64, device=old.device)
    return old.copy_(new) if new.shape == old.shape else new


def spans(rows: Sequence[int], lengths: Sequence[int]) -> list[Span]:
    """The neighbours that are equally long. rows: ascending."""
    found: list[Span] = []
    for index, (row, length) in enumerate(zip(rows, lengths)):
        if found and found[-1][3] == length and found[-1][2] + index - found[-1][0] == row:
            found[-1] = (found[-1][0], index + 1, found[-1][2], length)
        else:
            found.append((index, index + 1, row, length))
    return found
