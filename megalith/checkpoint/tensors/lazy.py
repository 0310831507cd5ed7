"""A tensor that is read when it is asked for, whole or a box of it: the currency of all conversions.

Every change of a tensor knows boxes: what is asked of the result asks its source for no more than that. The words are
torch's: `t`, `narrow`, `chunk`, `reshape`, `index_select`, `cat`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalith.common.errors import CheckpointError, problem

Index = tuple[slice, ...]  # a box: a slice of step 1 for each of the first axes
BLOCK = 1 << 20  # elements that are cast at a time
SCATTERED = 16  # rows in a run, on average, below which what lies between the runs is read too


@dataclass(frozen=True, kw_only=True)
class Lazy:
    """A tensor that is read when asked for. What `read` gives may be a map of its file, private to this process.

    box: reads the part at an index alone, where the file allows it; None: `read` makes all of it, or nothing.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    box: Callable[[Index], Tensor] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        """A tensor that is in memory."""
        return cls(shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor, box=lambda index: tensor[index])

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Lazy:
        """A shape alone: to find the shapes of what is made of it."""
        return cls(shape=tuple(shape), dtype=dtype, read=lambda: torch.empty(shape, dtype=dtype, device="meta"))

    def part(self, index: Index) -> Tensor:
        """What `read` would have at this index."""
        return self.box(index) if self.box else self.read()[index]

    def at(self, index: Index) -> Lazy:
        """The box at this index, as a tensor of its own."""
        found = self
        for axis, taken in enumerate(ranges(self.shape, index)):
            if len(taken) < self.shape[axis]:
                found = found.narrow(axis, taken.start, len(taken))
        return found

    def to(self, dtype: torch.dtype) -> Lazy:
        """The tensor in another format; where it can be read in parts, BLOCK elements are in memory in both."""

        if dtype == self.dtype:
            return self

        def part(index: Index = ()) -> Tensor:
            if self.box is None or not self.shape:
                return self.part(index).to(dtype)
            taken = ranges(self.shape, index)
            made = torch.empty([len(each) for each in taken], dtype=dtype)
            for rows, place in _rows(taken):
                made[rows] = self.part(place)
            return made

        return _made(self.shape, dtype, part, self)

    def elementwise(self, change: Callable[[Tensor], Tensor]) -> Lazy:
        """The tensor with `change` applied to each element by itself: minus one, say."""
        kind = change(torch.empty(0, dtype=self.dtype, device="meta")).dtype
        return _made(self.shape, kind, lambda index=(): change(self.part(index)), self)

    def t(self) -> Lazy:
        """A matrix transposed; what has fewer axes stays as it is."""
        if len(self.shape) < 2:
            return self
        shape = self.shape[::-1]
        return _made(shape, self.dtype, lambda index=(): self.part(slices(shape, index)[::-1]).t(), self)

    def narrow(self, axis: int, first: int, length: int) -> Lazy:
        """`length` rows from row `first` on, counted along an axis."""
        shape = (*self.shape[:axis], length, *self.shape[axis + 1 :])

        def part(index: Index = ()) -> Tensor:
            box = slices(shape, index)
            return self.part((*box[:axis], slice(box[axis].start + first, box[axis].stop + first), *box[axis + 1 :]))

        return _made(shape, self.dtype, part, self)

    def chunk(self, count: int, axis: int = 0) -> list[Lazy]:
        """So many equal parts along an axis."""
        step = self.shape[axis] // count
        return [self.narrow(axis, number * step, step) for number in range(count)]

    def index_select(self, rows: Tensor) -> Lazy:
        """Rows (along the first axis) in another order, or some of them. rows: their numbers, int64 [n]."""
        shape = (len(rows), *self.shape[1:])

        def part(index: Index = ()) -> Tensor:
            first, *others = slices(shape, index)
            return _select(self, rows[first], tuple(others))

        return _made(shape, self.dtype, part, self)

    def reshape(self, shape: Sequence[int]) -> Lazy:
        """The same elements in the same order under another shape. Of a box the rows that it is in are read."""
        shape = tuple(shape)
        if shape == self.shape:
            return self
        if self.shape == (1, *shape):
            return _made(shape, self.dtype, lambda index=(): self.part((slice(0, 1), *slices(shape, index)))[0], self)
        if not shape:
            return _made(shape, self.dtype, lambda index=(): self.read().reshape(()), self)
        width = math.prod(shape[1:])

        def part(index: Index = ()) -> Tensor:
            taken = ranges(shape, index)
            if self.box is None:
                return self.read().reshape(shape)[index]
            if tuple(map(len, taken[1:])) == shape[1:]:
                return _elements(self, taken[0].start * width, taken[0].stop * width).view(-1, *shape[1:])
            made = torch.empty([len(each) for each in taken], dtype=self.dtype)
            for rows, (at, *others) in _rows(taken, width):
                flat = _elements(self, at.start * width, at.stop * width)
                made[rows] = flat.view(-1, *shape[1:])[(slice(None), *others)]
            return made

        return _made(shape, self.dtype, part, self)


def cat(parts: Sequence[Lazy], axis: int = 0) -> Lazy:
    """Tensors one after another along an axis, such as the tensor-parallel parts of one weight, in the first one's format.

    One part is in memory at a time beside the result.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])

    def part(index: Index = ()) -> Tensor:
        box = slices(shape, index)
        whole, start = torch.empty([each.stop - each.start for each in box], dtype=first.dtype), 0
        for each in parts:
            stop = start + each.shape[axis]
            low, high = max(start, box[axis].start), min(stop, box[axis].stop)
            if low < high:
                piece = each.part((*box[:axis], slice(low - start, high - start), *box[axis + 1 :]))
                if piece.shape == whole.shape:
                    return piece.to(first.dtype)
                whole.narrow(axis, low - box[axis].start, high - low).copy_(piece)
            start = stop
        return whole

    return _made(shape, first.dtype, part, *parts)


def ranges(shape: tuple[int, ...], index: Index) -> list[range]:
    """What an index takes along every axis."""
    whole = (*index, *[slice(None)] * (len(shape) - len(index)))
    return [range(size)[each] for size, each in zip(shape, whole, strict=True)]


def slices(shape: tuple[int, ...], index: Index) -> Index:
    """An index with a beginning and an end along every axis."""
    return tuple(slice(each.start, each.stop) for each in ranges(shape, index))


def _made(shape: Sequence[int], dtype: torch.dtype, part: Callable[..., Tensor], *sources: Lazy) -> Lazy:
    """What `part` makes of its sources; it can be read in parts where all of them can."""
    boxes = all(source.box is not None for source in sources)
    return Lazy(shape=tuple(shape), dtype=dtype, read=part, box=part if boxes else None)


def _select(source: Lazy, rows: Tensor, others: Index) -> Tensor:
    """Some rows of a tensor, and of these a box: those that follow one another are read at once."""
    if source.box is None:
        return source.read()[rows][(slice(None), *others)]
    runs = torch.tensor_split(rows, (rows.diff() != 1).nonzero().flatten() + 1)
    if len(rows) and len(runs) > 1 and len(rows) < SCATTERED * len(runs):
        low, high = int(rows.min()), int(rows.max()) + 1
        return source.part((slice(low, high), *others))[rows - low]
    sizes = [each.stop - each.start for each in others]
    made, first = torch.empty((len(rows), *sizes), dtype=source.dtype), 0
    for run in runs if len(rows) else ():
        piece = source.part((slice(int(run[0]), int(run[-1]) + 1), *others))
        if len(runs) == 1:
            return piece
        made[first : first + len(run)] = piece
        first += len(run)
    return made


def _elements(source: Lazy, first: int, last: int) -> Tensor:
    """Elements `first` to `last` of a tensor in row-major order."""
    ones = next((axis for axis, size in enumerate(source.shape) if size != 1), len(source.shape) - 1)
    width = math.prod(source.shape[ones + 1 :])
    begin = first // width if width else 0
    end = -(-last // width) if width else 0
    rows = source.part((*[slice(0, 1)] * ones, slice(begin, end))).reshape(-1)
    return rows[first - begin * width : last - begin * width]


def _rows(taken: Sequence[range], width: int | None = None) -> Iterator[tuple[slice, Index]]:
    """A box in blocks of rows: (rows of the box, where they are in the whole). width: elements read for a row."""
    each = max(1, BLOCK // max(1, width or math.prod(map(len, taken[1:]))))
    others = tuple(slice(axis.start, axis.stop) for axis in taken[1:])
    for first in range(0, len(taken[0]), each):
        rows = slice(first, min(first + each, len(taken[0])))
        yield rows, (slice(taken[0].start + rows.start, taken[0].start + rows.stop), *others)


def check_range(tensors: Mapping[str, Lazy], dtype: torch.dtype | None) -> None:
    """Raise CheckpointError with every tensor that has finite elements beyond the range of `dtype`, where a cast makes
    them infinite, and with every weight of which it makes all elements zero (a bias so small is none before, either).

    Those of a format with a wider range are read, once; None: nothing is cast.
    """
    lost = {name: _lost(lazy, dtype) for name, lazy in tensors.items()} if dtype else {}
    beyond = {name: count for name, (count, _) in lost.items() if count}
    vanished = sorted(name for name, (_, whole) in lost.items() if whole and not name.endswith("bias"))
    if dtype is None or not (beyond or vanished):
        return
    word, limits = str(dtype).removeprefix("torch."), torch.finfo(dtype)
    told = [f"{count} in {name}" for name, count in sorted(beyond.items(), key=lambda each: -each[1])] or vanished
    rule = f"{word} holds numbers up to {limits.max:.6g}, and {sum(beyond.values())} weights would become infinite"
    if not beyond:
        rule = f"{word} holds numbers from {limits.smallest_normal * limits.eps:.2g}, and all elements would become 0"
        rule += f" in {len(vanished)} weights"
    more = f" and in {len(told) - 8} more tensors" * (len(told) > 8)
    wider = (
        "Write --dtype bfloat16, which has the range of float32, or float32"
        if dtype == torch.float16
        else "Write --dtype float32"
    )
    cure = "Leave it out, which keeps the source's float64" if dtype == torch.float32 else wider
    raise CheckpointError(problem("--dtype", word, rule + f": {', '.join(told[:8])}{more}", cure))


def _lost(lazy: Lazy, dtype: torch.dtype) -> tuple[int, bool]:
    """Finite elements of a tensor that are infinite in `dtype`; whether it has elements that are not 0, and all are 0 there."""
    if not (lazy.dtype.is_floating_point and torch.finfo(lazy.dtype).max > torch.finfo(dtype).max):
        return 0, False
    count, something, left = 0, False, False
    for part in blocks(lazy):
        narrow = part.to(dtype)
        count += int((narrow.isinf() & part.isfinite()).sum())
        something, left = something or bool(part.any()), left or bool(narrow.any())
    return count, something and not left


def blocks(lazy: Lazy) -> Iterator[Tensor]:
    """The elements, in parts of about BLOCK where the file allows it; the tensor is never in memory in two formats."""
    if lazy.box is None or not lazy.shape:
        yield from lazy.read().reshape(-1).split(BLOCK)
        return
    rows = max(1, BLOCK * lazy.shape[0] // max(1, torch.Size(lazy.shape).numel()))
    for first in range(0, lazy.shape[0], rows):
        yield lazy.part((slice(first, first + rows),))
