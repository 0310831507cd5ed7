"""Copies that several ranks keep of one parameter: they must be equal, or no one model was trained.

Norms, row-parallel biases and position embeddings lie on every tensor-parallel rank, the word embedding on the first and the last
pipeline stage. Nothing in a file keeps them equal, and a reader that takes rank 0's says nothing where they are not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalith.checkpoint.lazy import Index, Lazy, ranges
from megalith.checkpoint.megatron.agreement import same_files
from megalith.common.errors import CheckpointError

BLOCK = 1 << 18  # elements compared at a time
NOISE = 1e-5  # of the largest value: what sums in another order differ by, in float32
SHOWN = 20  # lines of an error
CURE = (
    "Ranks keep equal copies of these, so the files are of different steps, or a rank went astray. Copy them again or take an earlier "
    "checkpoint; --replicas average takes the mean of the copies"
)


class Difference(NamedTuple):
    """Of two copies. largest: difference of two elements; scale: the largest value; rounding: whether it is no more than that."""

    largest: float
    scale: float
    rounding: bool


@dataclass
class Replicas:
    """The copies that were met while a checkpoint was read. how: equal, where others are an error, or average.

    files: {file: what it holds beside tensors} of the ranks, which must be of one step.
    """

    how: str = "equal"
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    met: list[tuple[str, dict[str, Lazy], int | None]] = field(default_factory=list)

    def one(self, name: str, copies: Mapping[str, Lazy], rows: int | None = None) -> Lazy:
        """The parameter `name` of its `copies`, {where: tensor}; `check` compares them later, the first `rows` of them."""
        several = dict(copies)
        if len(several) > 1:
            self.met.append((name, several, rows))
        same = {copy.shape for copy in several.values()}
        return mean(list(several.values())) if self.how == "average" and len(same) == 1 else next(iter(several.values()))

    def check(self) -> list[str]:
        """Compare all copies, block by block; notes on those that differ. Raises CheckpointError where they differ above rounding."""
        same_files(self.files)
        wrong, slight = list[str](), list[str]()
        for name, copies, rows in self.met:
            (first, one), *others = copies.items()
            for where, other in others:
                if one.shape != other.shape:
                    wrong.append(f"{name}: {first} has {list(one.shape)}, {where} {list(other.shape)}")
                elif (found := difference(one, other, rows)).largest != 0:
                    text = f"{name}: {first} and {where} differ by up to {found.largest:.3g}, the largest value is {found.scale:.3g}"
                    (slight if found.rounding else wrong).append(text)
        if wrong and (self.how != "average" or any(" has [" in line for line in wrong)):
            more = [f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
            raise CheckpointError("\n".join(["copies of one parameter differ:", *wrong[:SHOWN], *more, f"{CURE}."]))
        differ = wrong + slight
        if not differ:
            return []
        taken = "their mean is taken" if self.how == "average" else "the first is taken"
        kind = "" if wrong else " by rounding"
        return [f"copies of {len(differ)} parameters differ{kind}, {taken}: {'; '.join(differ[:3])}{' ...' * (len(differ) > 3)}"]


def difference(one: Lazy, other: Lazy, rows: int | None = None) -> Difference:
    """How much two tensors of one shape differ in their first `rows`. Two NaNs are equal; NaN and a number differ by NaN."""
    step = max(torch.finfo(each.dtype).eps if each.dtype.is_floating_point else 0.0 for each in (one, other))
    largest, scale, excess = (torch.zeros(()) for _ in range(3))
    for a, b in zip(_blocks(one, rows), _blocks(other, rows), strict=True):
        if not a.numel():
            continue
        same, a, b = torch.equal(a, b), a.float(), b.float()
        size = torch.maximum(a.abs(), b.abs())
        scale = torch.maximum(scale, size.max())
        if not same:
            apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
            largest, excess = torch.maximum(largest, apart.max()), torch.maximum(excess, (apart - step * size).max())
    return Difference(float(largest), float(scale), bool(excess <= NOISE * scale))


def mean(copies: Sequence[Lazy]) -> Lazy:
    """The mean of tensors of one shape."""
    return _combined(list(copies), 1 / len(copies))


def total(copies: Sequence[Lazy]) -> Lazy:
    """Their sum."""
    return _combined(list(copies), 1.0)


def _combined(copies: list[Lazy], factor: float) -> Lazy:
    first = copies[0]

    def part(index: Index = ()) -> Tensor:
        made = torch.zeros([len(each) for each in ranges(first.shape, index)])
        for copy in copies:
            made += copy.part(index)
        return (made * factor).to(first.dtype)

    return Lazy(shape=first.shape, dtype=first.dtype, read=functools.partial(_by_rows, first, part), box=part)


def _by_rows(like: Lazy, part) -> Tensor:
    """All of it, made block by block, so that the sums in float32 are never whole in memory."""
    made = torch.empty(like.shape, dtype=like.dtype)
    for index in _indices(like.shape, None):
        made[index] = part(index)
    return made


def _blocks(lazy: Lazy, rows: int | None) -> Iterator[Tensor]:
    whole = lazy.read() if lazy.box is None else None  # what cannot be read in parts is read once
    for index in _indices(lazy.shape, rows):
        yield lazy.part(index) if whole is None else whole[index]


def _indices(shape: tuple[int, ...], rows: int | None) -> Iterator[Index]:
    """Ranges of rows of at most BLOCK elements, up to row `rows`."""
    if not shape:
        yield ()
        return
    last = shape[0] if rows is None else min(shape[0], max(rows, 0))
    count = max(1, BLOCK * shape[0] // max(1, torch.Size(shape).numel()))
    yield from ((slice(first, min(first + count, last)),) for first in range(0, last, count))
