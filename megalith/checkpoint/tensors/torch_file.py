"""torch.save of tensors that are not in memory: the file is made first, with space for them, and filled one by one."""

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
class Placeholder:
    """A tensor that is not in memory: its shape and type, and the pieces that fill it, (first element, reader)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[int, Callable[[], Tensor]], ...]


def save(path: pathlib.Path, content: Any) -> None:
    """Write `content`: dicts and lists of numbers and text, with a Placeholder for each tensor. torch.load reads it.

    One piece is in memory at a time. (The zip's checksums are those of the empty space; torch does not compare them.)
    """
    placeholders = list(_placeholders(content))
    with torch.serialization.skip_data():
        torch.save(_replace(content), path)  # torch.empty allocates no pages that are never touched
    window = Window.of(path)
    with window.open() as file:
        locations = zip_records(window, file).locations
    with open(path, "r+b") as file:
        for key, placeholder in enumerate(placeholders):
            for first, read in placeholder.pieces:
                file.seek(locations[str(key)][0] + first * placeholder.dtype.itemsize)
                for block in read().reshape(-1).split(BLOCK):
                    file.write(block.to(placeholder.dtype).view(torch.uint8).numpy().data)


def _placeholders(content: Any) -> Iterator[Placeholder]:
    """The placeholders, in the order in which pickle meets them."""
    if isinstance(content, Placeholder):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _placeholders(item)


def _replace(content: Any) -> Any:
    if isinstance(content, Placeholder):
        return torch.empty(content.shape, dtype=content.dtype)
    if isinstance(content, dict):
        return {name: _replace(item) for name, item in content.items()}
    return [_replace(item) for item in content] if isinstance(content, (list, tuple)) else content
