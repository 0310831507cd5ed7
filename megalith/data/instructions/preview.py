"""A sample as text with its mask, to be looked at before a run: no number of the run shows a wrong mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

MARKS = {True: "trained | ", False: "        | "}
MOST_LINES, MOST_CHARACTERS = 30, 160  # shown; of one line


def preview(ids: np.ndarray, trained: np.ndarray, decode: Callable[[Iterable[int]], str]) -> Iterator[str]:
    """Lines of text, each of tokens that are all trained or all not. ids: int [n]. trained: bool [n]."""
    edges = np.flatnonzero(np.diff(trained)) + 1
    runs = zip(np.split(ids, edges), np.split(trained, edges))
    texts = [(MARKS[bool(mask[0])], decode(run.tolist()).removesuffix("\n")) for run, mask in runs]
    lines = [mark + part for mark, text in texts for part in text.split("\n")]
    for line in lines[:MOST_LINES]:
        yield line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]} ..."
    if len(lines) > MOST_LINES:
        yield f"{MARKS[False]}({len(lines) - MOST_LINES} lines more)"
