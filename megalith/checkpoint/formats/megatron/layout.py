"""How Megatron splits one tensor among tensor-parallel ranks, and in which order it stacks fused tensors.

Each split has two functions: from the ranks' shards to the parameters, and back.

    replicated    every rank has the full tensor     rows, columns   split along the first, the second dimension
    vocabulary    rows, with padding at the end      halves          two tensors, split into rows, a pair on each rank
    qkv, pair     queries, keys and values of the rank's heads; keys and values alone. In one of three orders:
                  grouped     by group of heads: its queries, its key, its value   (version 2.0 and later)
                  interleaved by head and channel: [heads, channels, 3]            (version 1.0)
                  thirds      all queries, all keys, all values of the rank        (version 0; Megatron-DeepSpeed
                              since December 2024)

Shapes: n query heads, g key/value heads, d channels of a head, t ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalith.checkpoint.tensors.lazy import Lazy, cat
from megalith.common.errors import CheckpointError, problem

SPLIT_DIM = {"rows": 0, "vocabulary": 0, "columns": 1}  # splits along one dimension, without a change of order


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes and orders that splits depend on. vocabulary: the true number of tokens; padded: Megatron's rows."""

    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    padded: int
    ranks: int = 1
    qkv: str = "grouped"
    gate_first: bool = True


Shape = tuple[int, ...]


def shard_shape(split: str, shapes: Sequence[Shape], layout: Layout) -> Shape:
    """The shape of one rank's shard of a tensor that holds parameters of these shapes."""
    rows, rest = sum(shape[0] for shape in shapes if shape), shapes[0][1:]
    if split == "vocabulary":
        return (layout.padded // layout.ranks, *rest)
    if split == "columns":
        return (rows, rest[0] // layout.ranks, *rest[1:])
    if split == "replicated" or (split == "pair" and layout.groups == 1):
        return shapes[0] if len(shapes) == 1 else (rows, *rest)
    return (rows // layout.ranks, *rest)


def merge_shards(split: str, shards: Sequence[Lazy], layout: Layout, count: int) -> list[Lazy]:
    """The `count` parameters, read on request, from the shards of all ranks."""
    if split == "replicated":
        return [shards[0]]
    if split in SPLIT_DIM:
        tensor = cat(shards, SPLIT_DIM[split])
        return [tensor.narrow(0, 0, layout.vocabulary) if split == "vocabulary" else tensor]
    if split == "pair" and layout.groups == 1:
        shards = shards[:1]
    pairs = [(shard, _unpack(split, torch.arange(shard.shape[0]), layout)) for shard in shards]
    return [cat([shard.index_select(rows[number]) for shard, rows in pairs]) for number in range(count)]


def take_shard(split: str, lazies: Sequence[Lazy], layout: Layout, rank: int, *, padding: bool = True) -> Tensor:
    """The shard on tensor-parallel rank `rank` of the tensor that holds these parameters.

    padding: padding rows of the vocabulary are copies of the last row, as in Megatron's own converters; without it they
    are zeros, as the moments of Adam need them.
    """
    if split == "vocabulary":
        return _vocabulary_shard(lazies[0], layout.padded // layout.ranks, rank, padding)
    tensors = [lazy.read() for lazy in lazies]
    if split == "replicated":
        return tensors[0]
    if split == "columns":
        return tensors[0].chunk(layout.ranks, dim=1)[rank]
    if split == "pair" and layout.groups == 1:
        return _pack(split, tensors, layout)
    return _pack(split, [tensor.chunk(layout.ranks)[rank] for tensor in tensors], layout)


def _vocabulary_shard(embedding: Lazy, rows: int, rank: int, copies: bool) -> Tensor:
    """The `rows` rows of a rank, with padding where the embedding has no more rows."""
    shard = embedding.part((slice(rank * rows, (rank + 1) * rows),))
    if len(shard) == rows:
        return shard
    last = embedding.part((slice(-1, None),))
    padding = (last if copies else torch.zeros_like(last)).expand(rows - len(shard), *embedding.shape[1:])
    return torch.cat([shard, padding])


def _unpack(split: str, shard: Tensor, layout: Layout) -> Sequence[Tensor]:
    """The tensors in one rank's shard; for a shard of row numbers the row numbers of each tensor."""
    if split == "rows":
        return [shard]
    if split == "halves":
        halves = shard.chunk(2)
        return halves if layout.gate_first else halves[::-1]
    queries, d = (0 if split == "pair" else layout.heads // layout.groups), layout.head_dim
    kinds = queries + 2
    if layout.qkv == "thirds":
        groups = len(shard) // (kinds * d)
        return [each for each in shard.split([queries * groups * d, groups * d, groups * d]) if len(each)]
    if layout.qkv == "interleaved":
        by_channel = shard.view(-1, d, kinds, *shard.shape[1:])
        return [by_channel[:, :, kind].flatten(0, 1) for kind in range(kinds)]
    by_group = shard.view(-1, kinds, d, *shard.shape[1:])
    tensors = [by_group[:, :queries], by_group[:, -2:-1], by_group[:, -1:]]
    return [tensor.flatten(0, 2) for tensor in (tensors if queries else tensors[1:])]


def _pack(split: str, tensors: list[Tensor], layout: Layout) -> Tensor:
    """One rank's shard from its tensors: the inverse of `_unpack`, in the order of version 3.0."""
    if split == "rows":
        return tensors[0]
    if split == "halves":
        return torch.cat(tensors if layout.gate_first else tensors[::-1])
    groups = len(tensors[-1]) // layout.head_dim
    return torch.cat([each.view(groups, -1, layout.head_dim, *each.shape[1:]) for each in tensors], dim=1).flatten(0, 2)


def check_divisible(layout: Layout, shapes: Sequence[tuple[str, str, Shape]]) -> None:
    """Raise CheckpointError where the ranks cannot have equal shards of the heads, or of a parameter.

    shapes: (name, split, full shape) of the parameters.
    """
    cure = "Take a number of ranks that divides it"
    rule = f"must be a multiple of the number of tensor-parallel ranks ({layout.ranks})"
    wrong = [
        problem(f"The number of {what}", number, rule, cure)
        for what, number in (("attention heads", layout.heads), ("key/value heads", layout.groups))
        if number % layout.ranks and not (number == 1 and what != "attention heads")
    ]
    for name, split, shape in shapes:
        size = shape[1] if split == "columns" else shape[0] if split in ("rows", "halves") else 0
        if size % layout.ranks:
            wrong.append(problem(f"The size of {name}", size, rule, cure))
    if wrong:
        raise CheckpointError("\n".join(wrong))
