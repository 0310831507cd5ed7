"""A tensor that is read when it is asked for: the currency of all conversions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megalith.common.errors import CheckpointError, problem

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
        made, first = torch.empty(self.shape, dtype=dtype), 0
        for part in _blocks(self):
            made[first : first + len(part)] = part
            first += len(part)
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
    wider = "Write --dtype bfloat16, which has the range of float32, or float32" if dtype == torch.float16 else "Write --dtype float32"
    cure = "Leave it out, which keeps the source's float64" if dtype == torch.float32 else wider
    raise CheckpointError(problem("--dtype", word, rule + f": {', '.join(told[:8])}{more}", cure))


def _lost(lazy: Lazy, dtype: torch.dtype) -> tuple[int, bool]:
    """Finite elements of a tensor that are infinite in `dtype`; whether it has elements that are not 0, and all are 0 there."""
    if not (lazy.dtype.is_floating_point and torch.finfo(lazy.dtype).max > torch.finfo(dtype).max):
        return 0, False
    count, something, left = 0, False, False
    for part in _blocks(lazy):
        narrow = part.to(dtype)
        count += int((narrow.isinf() & part.isfinite()).sum())
        something, left = something or bool(part.any()), left or bool(narrow.any())
    return count, something and not left


def _blocks(lazy: Lazy) -> Iterator[Tensor]:
    """The elements, in parts of about BLOCK where the file allows it; the tensor is never in memory in two formats."""
    if lazy.box is None or not lazy.shape:
        yield from lazy.read().reshape(-1).split(BLOCK)
        return
    rows = max(1, BLOCK * lazy.shape[0] // max(1, torch.Size(lazy.shape).numel()))
    for first in range(0, lazy.shape[0], rows):
        yield lazy.part((slice(first, first + rows),))
