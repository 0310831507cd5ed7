"""Copies that several ranks keep of one parameter: they must be equal, or no one model was trained.

Norms, row-parallel biases and position embeddings lie on every tensor-parallel rank, the word embedding on the first and the last
pipeline stage. Nothing in a file keeps them equal, and a reader that takes rank 0's says nothing where they are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalith.checkpoint.formats.megatron.agreement import same_files
from megalith.checkpoint.tensors.lazy import Index, Lazy, ranges
from megalith.common.errors import CheckpointError

BLOCK = 1 << 18  # elements compared at a time
NOISE = 1e-5  # of the largest value: what sums in another order differ by, in float32
SHOWN = 20  # lines of an error
HEAD = "output_layer.weight"
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
    """The copies that were met while a checkpoint was read.

    how: equal, where others are an error, average, or first, which compares none.

    files: {file: what it holds beside tensors} of the ranks, which must be of one step.
    """

    how: str = "equal"
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shapes: list[str] = field(default_factory=list)  # lines on copies of several shapes,
    wrong: list[str] = field(default_factory=list)  # on those that differ,
    slight: list[str] = field(default_factory=list)  # and on those that differ by rounding

    def one(self, name: str, copies: Mapping[str, Lazy], rows: int | None = None) -> Lazy:
        """The parameter `name` of its `copies`, {where: tensor}, whose first `rows` are compared block by block."""
        (first, one), *others = copies.items()
        if self.how == "first":
            return one
        before = len(self.wrong) + len(self.slight)
        for where, other in others:
            if one.shape != other.shape:
                self.shapes.append(f"{name}: {first} has {list(one.shape)}, {where} {list(other.shape)}")
                return one
            found = difference(one, other, rows)
            if found.largest != 0:
                text = f"differ by up to {found.largest:.3g}, the largest value is {found.scale:.3g}"
                (self.slight if found.rounding else self.wrong).append(f"{name}: {first} and {where} {text}")
        differ = len(self.wrong) + len(self.slight) > before
        return mean(list(copies.values())) if differ and self.how == "average" else one

    def check(self) -> list[str]:
        """Notes on copies that differ. Raises CheckpointError for those that must not, and for files of different steps."""
        same_files(self.files)
        bad = self.shapes + (self.wrong if self.how != "average" else [])
        if bad:
            more = [f"... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
            head = (
                "; --untie-embeddings-and-output-weights reads a head of its own"
                if any(HEAD in each for each in bad)
                else ""
            )
            raise CheckpointError("\n".join(["copies of one parameter differ:", *bad[:SHOWN], *more, f"{CURE}{head}."]))
        differ = self.wrong + self.slight
        if not differ:
            return []
        taken = "their mean is taken" if self.how == "average" else "the first is taken"
        told = "; ".join(differ[:3]) + " ..." * (len(differ) > 3)
        return [f"copies of {len(differ)} parameters differ{'' if self.wrong else ' by rounding'}, {taken}: {told}"]


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
        taken = ranges(first.shape, index)
        made = torch.empty([len(each) for each in taken], dtype=first.dtype)
        others = [slice(each.start, each.stop) for each in taken[1:]]
        for (rows,) in _indices(tuple(made.shape), None):  # so that sums in float32 are never whole in memory
            where = (slice(taken[0].start + rows.start, taken[0].start + rows.stop), *others)
            made[rows] = sum(copy.part(where).float() for copy in copies) * factor
        return made

    return Lazy(shape=first.shape, dtype=first.dtype, read=part, box=part)


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
