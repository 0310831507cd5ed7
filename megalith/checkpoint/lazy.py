"""A tensor that is read when it is asked for: the currency of all conversions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Index = tuple[slice, ...]
BLOCK = 1 << 20  # elements that are cast at a time


@dataclass(frozen=True, kw_only=True)
class Lazy:
    """A tensor that is read when asked for. What `read` gives may be a map of its file, private to this process.

    box: reads the part at an index alone, where the file allows it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    box: Callable[[Index], Tensor] | None = None

    def part(self, index: Index) -> Tensor:
        """What `read` would have at this index."""
        return self.box(index) if self.box else self.read()[index]

    def to(self, dtype: torch.dtype) -> Lazy:
        """The tensor in another format: where it can be read in parts, it is never in memory in both."""
        return Lazy(shape=self.shape, dtype=dtype, read=lambda: self._cast(dtype))

    def _cast(self, dtype: torch.dtype) -> Tensor:
        if self.box is None or not self.shape or dtype == self.dtype:
            return self.read().to(dtype)
        made = torch.empty(self.shape, dtype=dtype)
        rows = max(1, BLOCK * len(made) // max(1, made.numel()))
        for first in range(0, len(made), rows):
            made[first : first + rows] = self.part((slice(first, first + rows),))
        return made

    def then(self, change: Callable[[Tensor], Tensor]) -> Lazy:
        """The tensor changed when it is read: a transposition, a slice, a cast. The new shape is found on the meta device."""
        empty = change(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return Lazy(shape=tuple(empty.shape), dtype=empty.dtype, read=lambda: change(self.read()))


def ranges(shape: tuple[int, ...], index: Index) -> list[range]:
    """What an index takes along every axis."""
    return [range(size)[each] for size, each in zip(shape, (*index, *[slice(None)] * (len(shape) - len(index))), strict=True)]


def join(parts: list[Lazy], change: Callable[[list[Tensor]], Tensor]) -> Lazy:
    """One tensor of several, such as the tensor-parallel parts of one weight."""
    empty = change([torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts])
    return Lazy(shape=tuple(empty.shape), dtype=empty.dtype, read=lambda: change([part.read() for part in parts]))
