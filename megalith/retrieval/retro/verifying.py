"""Which parts of a Retro folder are damaged, by their checksums."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

from megalith.data import array_folder
from megalith.data.retro import DATABASE, NEIGHBORS, block_ranges, read_database, read_neighbors, sample_ranges
from megalith.retrieval import store
from megalith.retrieval.retro import database, neighbors


def verify(workdir: str | os.PathLike) -> Iterator[tuple[str, int, list[str]]]:
    """(what, number of its parts, a line for each damaged file) of all that is there, after all bytes were read."""
    workdir = pathlib.Path(workdir)
    if (workdir / "db" / DATABASE).exists():
        blocks = len(block_ranges(read_database(workdir / "db")))
        yield "db", blocks, _lines(workdir / "db", blocks, database.ARRAYS)
    if (workdir / "index" / store.DESCRIPTION).exists():
        found = [f"{workdir / 'index' / name} {what}" for name, what in store.verify(workdir / "index")]
        yield "index", store.read_plan(workdir / "index").shards, found
    for path in sorted(workdir.glob(f"neighbors/*/{NEIGHBORS}")):
        facts = read_neighbors(path.parent)
        blocks = len(sample_ranges(facts["samples"], facts["block_size"]))
        yield f"neighbors/{path.parent.name}", blocks, _lines(path.parent, blocks, neighbors.ARRAYS)


def _lines(folder: pathlib.Path, parts: int, names: tuple[str, ...]) -> list[str]:
    return [f"{folder / name} {what}" for _, name, what in array_folder.damaged(folder, parts, names)]
