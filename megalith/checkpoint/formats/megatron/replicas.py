"""Copies of one parameter on several ranks: they must be equal, or the ranks did not train one model.

Norms, row-parallel biases and position embeddings are on every tensor-parallel rank, the word embedding is on the first
and the last pipeline stage. Nothing in a file guarantees that the copies are equal, and a reader that takes those of
rank 0 would not notice where they are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalith.checkpoint.formats.megatron.agreement import check_same_files
from megalith.checkpoint.tensors.lazy import Index, Lazy, ranges
from megalith.common.errors import CheckpointError

BLOCK_SIZE = 1 << 18  # elements compared at a time
ROUNDING_TOLERANCE = 1e-5  # times the largest value: float32 sums in another order differ by this much
MAX_LINES = 20  # lines of an error
OUTPUT_LAYER = "output_layer.weight"
CURE = (
    "All ranks keep equal copies of these, so the files are of different steps, or the training of a rank went wrong. "
    "Copy them again or take an earlier checkpoint; --replicas average takes the mean of the copies"
)


class Difference(NamedTuple):
    """The difference of two copies.

    largest: the largest difference of two elements. scale: the largest value. rounding: whether rounding explains it.
    """

    largest: float
    scale: float
    rounding: bool


@dataclass
class Replicas:
    """The copies found while a checkpoint is read.

    policy: equal (copies that differ are an error), average (their mean is taken), or first (none are compared).
    files: {file: its content without tensors} of the ranks, which must be of one step.
    """

    policy: str = "equal"
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shapes: list[str] = field(default_factory=list)  # lines about copies of several shapes,
    unequal: list[str] = field(default_factory=list)  # about those that differ,
    rounded: list[str] = field(default_factory=list)  # and about those that differ by rounding

    def merge(self, name: str, copies: Mapping[str, Lazy], rows: int | None = None) -> Lazy:
        """The parameter `name` from its `copies`, {location: tensor}; their first `rows` are compared in blocks."""
        (first_location, first), *others = copies.items()
        if self.policy == "first":
            return first
        before = len(self.unequal) + len(self.rounded)
        for location, other in others:
            if first.shape != other.shape:
                text = f"{first_location} has {list(first.shape)}, {location} {list(other.shape)}"
                self.shapes.append(f"{name}: {text}")
                return first
            found = difference(first, other, rows)
            if found.largest != 0:
                text = f"differ by up to {found.largest:.3g}, the largest value is {found.scale:.3g}"
                lines = self.rounded if found.rounding else self.unequal
                lines.append(f"{name}: {first_location} and {location} {text}")
        differ = len(self.unequal) + len(self.rounded) > before
        return mean(list(copies.values())) if differ and self.policy == "average" else first

    def check(self) -> list[str]:
        """Notes about copies that differ.

        Raises CheckpointError where copies must not differ, and where the files are of several steps.
        """
        check_same_files(self.files)
        bad = self.shapes + (self.unequal if self.policy != "average" else [])
        if bad:
            more = [f"... and {len(bad) - MAX_LINES} more"] if len(bad) > MAX_LINES else []
            untie = (
                "; --untie-embeddings-and-output-weights reads a separate output layer"
                if any(OUTPUT_LAYER in line for line in bad)
                else ""
            )
            lines = ["copies of one parameter differ:", *bad[:MAX_LINES], *more, f"{CURE}{untie}."]
            raise CheckpointError("\n".join(lines))
        differ = self.unequal + self.rounded
        if not differ:
            return []
        taken = "their mean is taken" if self.policy == "average" else "the first is taken"
        examples = "; ".join(differ[:3]) + " ..." * (len(differ) > 3)
        by_rounding = "" if self.unequal else " by rounding"
        return [f"copies of {len(differ)} parameters differ{by_rounding}, {taken}: {examples}"]


def difference(one: Lazy, other: Lazy, rows: int | None = None) -> Difference:
    """How much two tensors of one shape differ in their first `rows`.

    Two NaNs are equal; NaN and a number differ by NaN.
    """
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
    return Difference(float(largest), float(scale), bool(excess <= ROUNDING_TOLERANCE * scale))


def mean(copies: Sequence[Lazy]) -> Lazy:
    """The mean of tensors of one shape."""
    return _combined(list(copies), 1 / len(copies))


def sum_of(copies: Sequence[Lazy]) -> Lazy:
    """The sum of tensors of one shape."""
    return _combined(list(copies), 1.0)


def _combined(copies: list[Lazy], factor: float) -> Lazy:
    first = copies[0]

    def part(index: Index = ()) -> Tensor:
        box = ranges(first.shape, index)
        combined = torch.empty([len(each) for each in box], dtype=first.dtype)
        other_dims = [slice(each.start, each.stop) for each in box[1:]]
        for (rows,) in _indices(tuple(combined.shape), None):  # in blocks, to bound the memory for float32 sums
            block = (slice(box[0].start + rows.start, box[0].start + rows.stop), *other_dims)
            combined[rows] = sum(copy.part(block).float() for copy in copies) * factor
        return combined

    return Lazy(shape=first.shape, dtype=first.dtype, read=part, box=part)


def _blocks(lazy: Lazy, rows: int | None) -> Iterator[Tensor]:
    tensor = lazy.read() if lazy.box is None else None  # a tensor that cannot be read in parts is read once
    for index in _indices(lazy.shape, rows):
        yield lazy.part(index) if tensor is None else tensor[index]


def _indices(shape: tuple[int, ...], rows: int | None) -> Iterator[Index]:
    """Ranges of rows of at most BLOCK elements, up to row `rows`."""
    if not shape:
        yield ()
        return
    last = shape[0] if rows is None else min(shape[0], max(rows, 0))
    count = max(1, BLOCK_SIZE * shape[0] // max(1, torch.Size(shape).numel()))
    yield from ((slice(first, min(first + count, last)),) for first in range(0, last, count))
