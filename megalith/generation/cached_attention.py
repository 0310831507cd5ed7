"""How one call of a model appends to the cache (cache.py) and attends to it; see layers/cache.py for the interface.

Shapes: b rows, s tokens of this call, n query heads, m key/value heads, d channels of a head, L positions of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megalith.generation.cache import KVCache, round_up_to_block
from megalith.layers.attention import CoreAttention
from megalith.layers.mask import AttentionMask


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

    def __init__(self, cache: KVCache):
        self.cache, self.length, self.biases = cache, cache.length, dict[tuple, Tensor]()
        self.positions = self.slots = self.sources = torch.zeros(0, dtype=torch.int64, device=cache.device)

    def begin(
        self, rows: Sequence[int], positions: Sequence[int], source_lengths: Sequence[int] = (), pad: int = 0,
        fixed_shapes: bool = False, batch_invariant: bool = True,
    ) -> None:  # fmt: skip
        """Prepare a step.

        rows: ascending, those that get a token. positions: of each row's new token. source_lengths: how many tokens
        each row's encoder has read. pad: padding tokens after the rows; their attention is 0. fixed_shapes: attend to
        whole rows, so that shapes are the same at every step. batch_invariant: see above; without it rows of equal
        length need no mask, because they attend only to the positions that they have filled.
        """
        cache = self.cache
        self.rows = len(rows)
        self.positions = at_same_address(self.positions, [[position] for position in (*positions, *[0] * pad)])
        self.sources = at_same_address(self.sources, list(source_lengths))
        heads = range(cache.kv_heads)
        slots = [
            (row * cache.kv_heads + head) * cache.length + position
            for row, position in zip(rows, positions)
            for head in heads
        ]
        self.slots = at_same_address(self.slots, slots)  # in a layer's memory, flattened to [rows x m x L, d]
        equal = len(set(positions)) == 1 and len(set(source_lengths)) <= 1
        self.filled = equal and not (fixed_shapes or batch_invariant)
        up = (lambda length: length) if self.filled else round_up_to_block
        self.spans = spans(rows, [self.length if fixed_shapes else up(position + 1) for position in positions])
        limit = cache.source_length
        self.source_spans = spans(rows, [limit if fixed_shapes else up(length) for length in source_lengths])
        self.biases.clear()

    def attend(
        self, core: CoreAttention, q: Tensor, k: Tensor | None, v: Tensor | None, mask: AttentionMask
    ) -> Tensor:  # fmt: skip
        """q [b, n, 1, d]; k, v [b, m, 1, d] or None -> [b, n, 1, d]."""
        memory, outputs = self.cache.layers[core.site], []
        if k is not None and v is not None:
            for tensor, new in ((memory.keys, k), (memory.values, v)):
                tensor.view(-1, tensor.shape[-1]).index_copy_(0, self.slots, new[: self.rows].reshape(-1, k.shape[-1]))
        heads, kv_heads, width = q.shape[1], memory.keys.shape[1], q.shape[3]
        # The query heads of a group become queries of its one key head: keys are read once and never repeated.
        grouped = q.reshape(len(q), kv_heads, heads // kv_heads, width)
        for first, last, row, length in self.spans if mask.causal else self.source_spans:
            bias = None if self.filled and mask.needs_no_bias else self.bias(core, mask, first, last, length, q)
            if bias is not None and bias.shape[1] > 1:
                bias = bias.reshape(last - first, kv_heads, heads // kv_heads, length)
            end = row + last - first
            keys, values = memory.keys[row:end, :, :length], memory.values[row:end, :, :length]
            outputs.append(
                scaled_dot_product_attention(grouped[first:last], keys, values, attn_mask=bias, scale=core.scale)
            )
        if len(q) > self.rows:
            outputs.append(grouped.new_zeros(len(q) - self.rows, *grouped.shape[1:]))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view(q.shape)

    def bias(self, core: CoreAttention, mask: AttentionMask, first: int, last: int, length: int, q: Tensor) -> Tensor:
        """The bias added to the scores of these rows, [b, 1 or n, 1, length]; one for all layers with the same mask."""
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
            distance = key - self.positions[first:last, None, :, None]  # [b, 1, 1, length], 0 for the token itself
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


def spans(rows: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(first, last + 1, row of the first, length) of neighbours that are equally long; rows: their rows, ascending."""
    found: list[tuple[int, int, int, int]] = []
    for index, (row, length) in enumerate(zip(rows, lengths)):
        if found and found[-1][3] == length and found[-1][2] + index - found[-1][0] == row:
            found[-1] = (found[-1][0], index + 1, found[-1][2], length)
        else:
            found.append((index, index + 1, row, length))
    return found
