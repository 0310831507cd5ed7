"""A tensor that is read when it is asked for, whole or a box of it (a rectangular part): what all conversions work on.

Every operation is aware of boxes: to read a box of the result, no more than that is read of the source. The names are
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
MIN_RUN_ROWS = 16  # consecutive rows, on average, below which the rows between such runs are read too


@dataclass(frozen=True, kw_only=True)
class Lazy:
    """A tensor that is read when asked for. What `read` returns may be a map of its file, private to this process.

    box: reads only the part at an index, where the file allows it; None: only `read`, which reads all of it.
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
        """A shape without data, to find the shapes of what is derived from it."""
        return cls(shape=tuple(shape), dtype=dtype, read=lambda: torch.empty(shape, dtype=dtype, device="meta"))

    def part(self, index: Index) -> Tensor:
        """What `read` has at this index."""
        return self.box(index) if self.box else self.read()[index]

    def at(self, index: Index) -> Lazy:
        """The box at this index, as a Lazy."""
        found = self
        for axis, selected in enumerate(ranges(self.shape, index)):
            if len(selected) < self.shape[axis]:
                found = found.narrow(axis, selected.start, len(selected))
        return found

    def to(self, dtype: torch.dtype) -> Lazy:
        """The tensor in another dtype; where it can be read in parts, only BLOCK elements are in memory in both."""
        if dtype == self.dtype:
            return self

        def part(index: Index = ()) -> Tensor:
            if self.box is None or not self.shape:
                return self.part(index).to(dtype)
            selected = ranges(self.shape, index)
            result = torch.empty([len(axis) for axis in selected], dtype=dtype)
            for rows, box in _row_blocks(selected):
                result[rows] = self.part(box)
            return result

        return _derived(self.shape, dtype, part, self)

    def elementwise(self, change: Callable[[Tensor], Tensor]) -> Lazy:
        """The tensor with `change` applied to each element by itself: minus one, say."""
        dtype = change(torch.empty(0, dtype=self.dtype, device="meta")).dtype
        return _derived(self.shape, dtype, lambda index=(): change(self.part(index)), self)

    def t(self) -> Lazy:
        """A matrix transposed; a tensor with fewer axes stays as it is."""
        if len(self.shape) < 2:
            return self
        shape = self.shape[::-1]
        return _derived(shape, self.dtype, lambda index=(): self.part(slices(shape, index)[::-1]).t(), self)

    def narrow(self, axis: int, first: int, length: int) -> Lazy:
        """`length` rows from row `first` on, counted along an axis."""
        shape = (*self.shape[:axis], length, *self.shape[axis + 1 :])

        def part(index: Index = ()) -> Tensor:
            box = slices(shape, index)
            return self.part((*box[:axis], slice(box[axis].start + first, box[axis].stop + first), *box[axis + 1 :]))

        return _derived(shape, self.dtype, part, self)

    def chunk(self, count: int, axis: int = 0) -> list[Lazy]:
        """`count` equal parts along an axis."""
        step = self.shape[axis] // count
        return [self.narrow(axis, number * step, step) for number in range(count)]

    def index_select(self, rows: Tensor) -> Lazy:
        """Rows (along the first axis) in another order, or some of them. rows: their numbers, int64 [n]."""
        shape = (len(rows), *self.shape[1:])

        def part(index: Index = ()) -> Tensor:
            first, *others = slices(shape, index)
            return _select(self, rows[first], tuple(others))

        return _derived(shape, self.dtype, part, self)

    def reshape(self, shape: Sequence[int]) -> Lazy:
        """The same elements in the same order in another shape. For a box, the rows that it lies in are read."""
        shape = tuple(shape)
        if shape == self.shape:
            return self
        if self.shape == (1, *shape):
            return _derived(
                shape, self.dtype, lambda index=(): self.part((slice(0, 1), *slices(shape, index)))[0], self
            )
        if not shape:
            return _derived(shape, self.dtype, lambda index=(): self.read().reshape(()), self)
        width = math.prod(shape[1:])

        def part(index: Index = ()) -> Tensor:
            selected = ranges(shape, index)
            if self.box is None:
                return self.read().reshape(shape)[index]
            if tuple(map(len, selected[1:])) == shape[1:]:
                return _elements(self, selected[0].start * width, selected[0].stop * width).view(-1, *shape[1:])
            result = torch.empty([len(axis) for axis in selected], dtype=self.dtype)
            for rows, (at, *others) in _row_blocks(selected, width):
                flat = _elements(self, at.start * width, at.stop * width)
                result[rows] = flat.view(-1, *shape[1:])[(slice(None), *others)]
            return result

        return _derived(shape, self.dtype, part, self)


def cat(parts: Sequence[Lazy], axis: int = 0) -> Lazy:
    """Tensors concatenated along an axis, such as the tensor-parallel parts of one weight, in the dtype of the first.

    One part is in memory at a time beside the result.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])

    def part(index: Index = ()) -> Tensor:
        box = slices(shape, index)
        result, start = torch.empty([each.stop - each.start for each in box], dtype=first.dtype), 0
        for lazy in parts:
            stop = start + lazy.shape[axis]
            low, high = max(start, box[axis].start), min(stop, box[axis].stop)
            if low < high:
                piece = lazy.part((*box[:axis], slice(low - start, high - start), *box[axis + 1 :]))
                if piece.shape == result.shape:
                    return piece.to(first.dtype)
                result.narrow(axis, low - box[axis].start, high - low).copy_(piece)
            start = stop
        return result

    return _derived(shape, first.dtype, part, *parts)


def ranges(shape: tuple[int, ...], index: Index) -> list[range]:
    """What an index selects along every axis."""
    complete = (*index, *[slice(None)] * (len(shape) - len(index)))
    return [range(size)[along] for size, along in zip(shape, complete, strict=True)]


def slices(shape: tuple[int, ...], index: Index) -> Index:
    """The same index, with a beginning and an end along every axis."""
    return tuple(slice(each.start, each.stop) for each in ranges(shape, index))


def _derived(shape: Sequence[int], dtype: torch.dtype, part: Callable[..., Tensor], *sources: Lazy) -> Lazy:
    """The Lazy that `part` reads from its sources; it can be read in parts where all of them can."""
    boxes = all(source.box is not None for source in sources)
    return Lazy(shape=tuple(shape), dtype=dtype, read=part, box=part if boxes else None)


def _select(source: Lazy, rows: Tensor, others: Index) -> Tensor:
    """A box of some rows of a tensor; consecutive rows are read at once."""
    if source.box is None:
        return source.read()[rows][(slice(None), *others)]
    runs = torch.tensor_split(rows, (rows.diff() != 1).nonzero().flatten() + 1)
    if len(rows) and len(runs) > 1 and len(rows) < MIN_RUN_ROWS * len(runs):
        low, high = int(rows.min()), int(rows.max()) + 1
        return source.part((slice(low, high), *others))[rows - low]
    sizes = [each.stop - each.start for each in others]
    result, first = torch.empty((len(rows), *sizes), dtype=source.dtype), 0
    for run in runs if len(rows) else ():
        piece = source.part((slice(int(run[0]), int(run[-1]) + 1), *others))
        if len(runs) == 1:
            return piece
        result[first : first + len(run)] = piece
        first += len(run)
    return result


def _elements(source: Lazy, first: int, last: int) -> Tensor:
    """Elements `first` to `last` of a tensor in row-major order."""
    ones = next((axis for axis, size in enumerate(source.shape) if size != 1), len(source.shape) - 1)
    width = math.prod(source.shape[ones + 1 :])
    begin = first // width if width else 0
    end = -(-last // width) if width else 0
    rows = source.part((*[slice(0, 1)] * ones, slice(begin, end))).reshape(-1)
    return rows[first - begin * width : last - begin * width]


def _row_blocks(selected: Sequence[range], width: int | None = None) -> Iterator[tuple[slice, Index]]:
    """A box in blocks of rows: (rows of the box, their box in the tensor). width: elements read for a row."""
    step = max(1, BLOCK // max(1, width or math.prod(map(len, selected[1:]))))
    others = tuple(slice(axis.start, axis.stop) for axis in selected[1:])
    for first in range(0, len(selected[0]), step):
        rows = slice(first, min(first + step, len(selected[0])))
        yield rows, (slice(selected[0].start + rows.start, selected[0].start + rows.stop), *others)


def check_range(tensors: Mapping[str, Lazy], dtype: torch.dtype | None) -> None:
    """Raise CheckpointError where a cast to `dtype` loses weights, with the names of the tensors.

    That is every tensor with finite elements beyond the range of `dtype`, which become infinite, and every weight of
    which all elements become zero (a bias that small has no effect before the cast, either). Tensors in a dtype of
    wider range are read, once. None: nothing is cast.
    """
    losses = {name: _cast_losses(lazy, dtype) for name, lazy in tensors.items()} if dtype else {}
    beyond = {name: count for name, (count, _) in losses.items() if count}
    vanished = sorted(name for name, (_, all_zero) in losses.items() if all_zero and not name.endswith("bias"))
    if dtype is None or not (beyond or vanished):
        return
    word, limits = str(dtype).removeprefix("torch."), torch.finfo(dtype)
    named = [f"{count} in {name}" for name, count in sorted(beyond.items(), key=lambda item: -item[1])] or vanished
    reason = f"{word} holds numbers up to {limits.max:.6g}, and {sum(beyond.values())} weights would become infinite"
    if not beyond:
        reason = f"{word} holds numbers from {limits.smallest_normal * limits.eps:.2g}, and all elements would become 0"
        reason += f" in {len(vanished)} weights"
    more = f" and in {len(named) - 8} more tensors" * (len(named) > 8)
    rule = f"must have the range of the weights: {reason}: {', '.join(named[:8])}{more}"
    wider = (
        "Write --dtype bfloat16, which has the range of float32, or float32"
        if dtype == torch.float16
        else "Write --dtype float32"
    )
    cure = "Leave it out, which keeps the source's float64" if dtype == torch.float32 else wider
    raise CheckpointError(problem("--dtype", word, rule, cure))


def _cast_losses(lazy: Lazy, dtype: torch.dtype) -> tuple[int, bool]:
    """(number of finite elements that become infinite in `dtype`, whether elements that were not 0 all become 0)."""
    if not (lazy.dtype.is_floating_point and torch.finfo(lazy.dtype).max > torch.finfo(dtype).max):
        return 0, False
    count, nonzero_before, nonzero_after = 0, False, False
    for part in blocks(lazy):
        cast = part.to(dtype)
        count += int((cast.isinf() & part.isfinite()).sum())
        nonzero_before, nonzero_after = nonzero_before or bool(part.any()), nonzero_after or bool(cast.any())
    return count, nonzero_before and not nonzero_after


def blocks(lazy: Lazy) -> Iterator[Tensor]:
    """The elements, in parts of about BLOCK where the file allows it; the tensor is never in memory in two dtypes."""
    if lazy.box is None or not lazy.shape:
        yield from lazy.read().reshape(-1).split(BLOCK)
        return
    rows = max(1, BLOCK * lazy.shape[0] // max(1, torch.Size(lazy.shape).numel()))
    for first in range(0, lazy.shape[0], rows):
        yield lazy.part((slice(first, first + rows),))
