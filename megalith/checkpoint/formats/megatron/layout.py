"""How Megatron splits one tensor among tensor-parallel ranks, and in which order it stacks what it fuses.

Each way of splitting is a pair of functions: the ranks' parts to our tensors, and back.

    whole         every rank has all of it           rows, columns   cut along the first, the second dimension
    vocabulary    rows, with padding at the end      halves          two tensors, cut into rows, a pair on each rank
    qkv, pair     queries, keys and values of the rank's heads, keys and values alone, in one of three orders:
                  grouped     by group of heads: its queries, its key, its value   (version 2.0 and later)
                  interleaved by head and channel: [heads, channels, 3]            (version 1.0)
                  thirds      all queries, all keys, all values of the rank        (version 0; Megatron-DeepSpeed since December 2024)

Shapes: n query heads, g key/value heads, d channels of a head, t ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalith.checkpoint.tensors.lazy import Lazy, cat
from megalith.common.errors import CheckpointError, problem

CUT = {"rows": 0, "vocabulary": 0, "columns": 1}  # what is cut along an axis and nothing else


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the splitting needs to know. vocabulary: the true number of words; padded: the rows Megatron has for them."""

    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    padded: int
    ranks: int = 1
    qkv: str = "grouped"
    gate_first: bool = True


Shape = tuple[int, ...]


def part_shape(split: str, ours: Sequence[Shape], layout: Layout) -> Shape:
    """The shape of one rank's part of a tensor that holds parameters of these shapes."""
    rows, rest = sum(shape[0] for shape in ours if shape), ours[0][1:]
    if split == "vocabulary":
        return (layout.padded // layout.ranks, *rest)
    if split == "columns":
        return (rows, rest[0] // layout.ranks, *rest[1:])
    if split == "whole" or (split == "pair" and layout.groups == 1):
        return ours[0] if len(ours) == 1 else (rows, *rest)
    return (rows // layout.ranks, *rest)


def merge(split: str, parts: Sequence[Lazy], layout: Layout, count: int) -> list[Lazy]:
    """Our tensors, read when asked for, of all ranks' parts."""
    if split == "whole":
        return [parts[0]]
    if split in CUT:
        whole = cat(parts, CUT[split])
        return [whole.narrow(0, 0, layout.vocabulary) if split == "vocabulary" else whole]
    if split == "pair" and layout.groups == 1:
        parts = parts[:1]
    pairs = [(part, _unpack(split, torch.arange(part.shape[0]), layout)) for part in parts]
    return [cat([part.index_select(rows[number]) for part, rows in pairs]) for number in range(count)]


def split_part(split: str, ours: Sequence[Lazy], layout: Layout, rank: int, *, padding: bool = True) -> Tensor:
    """The part of tensor-parallel rank `rank` of the tensor that holds these parameters.

    padding: dummy words are copies of the last one, as in Megatron's own converters; without it zeros, as moments want them.
    """
    if split == "vocabulary":
        return _words(ours[0], layout.padded // layout.ranks, rank, padding)
    tensors = [lazy.read() for lazy in ours]
    if split == "whole":
        return tensors[0]
    if split == "columns":
        return tensors[0].chunk(layout.ranks, dim=1)[rank]
    if split == "pair" and layout.groups == 1:
        return _pack(split, tensors, layout)
    return _pack(split, [tensor.chunk(layout.ranks)[rank] for tensor in tensors], layout)


def _words(words: Lazy, rows: int, rank: int, copies: bool) -> Tensor:
    """The rows of a rank that has so many; only what this rank lacks is made up."""
    part = words.part((slice(rank * rows, (rank + 1) * rows),))
    if len(part) == rows:
        return part
    last = words.part((slice(-1, None),))
    return torch.cat([part, (last if copies else torch.zeros_like(last)).expand(rows - len(part), *words.shape[1:])])


def _unpack(split: str, part: Tensor, layout: Layout) -> Sequence[Tensor]:
    """The tensors in one rank's part, or of its rows' numbers those of each tensor."""
    if split == "rows":
        return [part]
    if split == "halves":
        halves = part.chunk(2)
        return halves if layout.gate_first else halves[::-1]
    queries, d = (0 if split == "pair" else layout.heads // layout.groups), layout.head_dim
    kinds = queries + 2
    if layout.qkv == "thirds":
        groups = len(part) // (kinds * d)
        return [each for each in part.split([queries * groups * d, groups * d, groups * d]) if len(each)]
    if layout.qkv == "interleaved":
        each = part.view(-1, d, kinds, *part.shape[1:])
        return [each[:, :, kind].flatten(0, 1) for kind in range(kinds)]
    each = part.view(-1, kinds, d, *part.shape[1:])
    pieces = [each[:, :queries], each[:, -2:-1], each[:, -1:]]
    return [piece.flatten(0, 2) for piece in (pieces if queries else pieces[1:])]


def _pack(split: str, tensors: list[Tensor], layout: Layout) -> Tensor:
    """One rank's part of its tensors: the inverse of `_unpack`, in the order of version 3.0."""
    if split == "rows":
        return tensors[0]
    if split == "halves":
        return torch.cat(tensors if layout.gate_first else tensors[::-1])
    groups = len(tensors[-1]) // layout.head_dim
    return torch.cat([each.view(groups, -1, layout.head_dim, *each.shape[1:]) for each in tensors], dim=1).flatten(0, 2)


def check_divisible(layout: Layout, shapes: Sequence[tuple[str, str, Shape]]) -> None:
    """Raise CheckpointError where a number of heads, or a parameter (name, split, shape of all of it), cannot be cut among the ranks."""
    wrong = [
        problem(
            what,
            number,
            f"each of {layout.ranks} tensor-parallel ranks takes as many",
            "Take a number of ranks that divides it",
        )
        for what, number in (("attention heads", layout.heads), ("key/value heads", layout.groups))
        if number % layout.ranks and not (number == 1 and what != "attention heads")
    ]
    for name, split, shape in shapes:
        size = shape[1] if split == "columns" else shape[0] if split in ("rows", "halves") else 0
        if size % layout.ranks:
            wrong.append(
                problem(
                    f"{name}, size",
                    size,
                    f"it is cut among {layout.ranks} ranks",
                    "Take a number of ranks that divides it",
                )
            )
    if wrong:
        raise CheckpointError("\n".join(wrong))
