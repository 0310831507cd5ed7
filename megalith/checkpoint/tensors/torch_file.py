"""torch.save of tensors that are not in memory: the file first, with room for them, then each into its place."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalith.checkpoint.tensors.lazy import BLOCK
from megalith.checkpoint.tensors.stored import Window, zip_records


@dataclass(frozen=True)
class Room:
    """Where a tensor will be: its form, and the pieces that fill it, (first element, what reads the piece)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[int, Callable[[], Tensor]], ...]


def save(path: pathlib.Path, content: Any) -> None:
    """Write `content`, plain data in dicts and lists with a Room for each tensor. torch.load reads the file as any other.

    One piece is in memory at a time. (The zip's checksums are those of the empty room; torch does not compare them.)
    """
    rooms = list(_rooms(content))
    with torch.serialization.skip_data():
        torch.save(_replace(content), path)  # memory that is never touched is never taken
    window = Window.of(path)
    with window.open() as file:
        places = zip_records(window, file).places
    with open(path, "r+b") as file:
        for key, room in enumerate(rooms):
            for first, read in room.pieces:
                file.seek(places[str(key)][0] + first * room.dtype.itemsize)
                for block in read().reshape(-1).split(BLOCK):
                    file.write(block.to(room.dtype).view(torch.uint8).numpy().data)


def _rooms(content: Any) -> Iterator[Room]:
    """In the order in which pickle meets them."""
    if isinstance(content, Room):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for each in content.values() if isinstance(content, dict) else content:
            yield from _rooms(each)


def _replace(content: Any) -> Any:
    if isinstance(content, Room):
        return torch.empty(content.shape, dtype=content.dtype)
    if isinstance(content, dict):
        return {name: _replace(each) for name, each in content.items()}
    return [_replace(each) for each in content] if isinstance(content, (list, tuple)) else content
