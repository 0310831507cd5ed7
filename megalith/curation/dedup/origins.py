"""Where documents are from: their file and line, as evidence names them, and their source."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from megalith.curation.documents import Document, dump
from megalith.curation.parts import PartOutput
from megalith.curation.run import Pass, Run


class Lines:
    """Lines of a file, mapped into memory; 8 bytes of each are kept."""

    def __init__(self, content: np.ndarray):
        """content: uint8, the bytes of the file."""
        self.content, self.ends = content, np.flatnonzero(content == ord("\n"))

    def __len__(self) -> int:
        """How many lines there are."""
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        """One line, without its end."""
        start = int(self.ends[number - 1]) + 1 if number else 0
        return self.content[start : int(self.ends[number])].tobytes().decode("utf-8")


class Origins:
    """Writes of each document of a part where it is from: its place in the part, its source, its id as a line of JSON.

    key: of the source in a record; "": the file is the source. id_key: of the id.
    """

    def __init__(self, key: str, id_key: str):
        """No source is known."""
        self.key, self.id_key, self.known = key, id_key, dict[str, int]()

    def add(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Of some documents, in order."""
        names = [
            str(document.record.get(self.key, "")) if self.key else f"\0{document.where[0]}" for document in documents
        ]
        out.add("sources", np.array([self.known.setdefault(name, len(self.known)) for name in names], np.int32))
        out.add("places", np.array([document.where for document in documents], np.int32))
        out.write("ids", b"".join(dump(document.record.get(self.id_key)) + b"\n" for document in documents))

    def finish(self, out: PartOutput) -> None:
        """The names of the part's sources."""
        out.record["sources"] = list(self.known)
        self.known = {}


def sources(run: Run, signed: Pass, key: str) -> tuple[list[str], np.ndarray]:
    """(names, of each document the number of its source). Without a key the file is the source."""
    known: dict[str, int] = {}
    pieces = [np.zeros(0, np.int64)]
    for record in signed.records:
        names = record["sources"]
        if not key:
            paths = run.paths(record["part"])
            names = [run.inputs.names.get(path, path) for path in (paths[int(name[1:])] for name in names)]
        numbers = np.array([known.setdefault(name, len(known)) for name in names], np.int64)
        pieces.append(numbers[signed.array(record, "sources", np.int32)])
    return list(known), np.concatenate(pieces)


class Names:
    """`file:line` of documents by number, those of the index first; and the ids of those that have one."""

    def __init__(self, run: Run, signed: Pass, earlier: Sequence[Lines] = ()):
        """earlier: the names of each run that is in the index."""
        self.locate, self.signed, self.earlier = run.locator(), signed, earlier
        counts = [*map(len, earlier), *(record["documents"] for record in signed.records)]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.places = [signed.array(record, "places", np.int32).reshape(-1, 2) for record in signed.records]
        self.ids = functools.lru_cache(64)(lambda at: Lines(signed.array(signed.records[at], "ids", np.uint8)))

    def described(self, document: int, role: str) -> dict[str, Any]:
        """What evidence says of one document, which is the "document" or the one that is "kept"."""
        part, inside = self._find(document)
        id_ = orjson.loads(self.ids(part)[inside]) if part >= 0 else None
        return {role: self(document)} | ({f"{role}_id": id_} if id_ is not None else {})

    def __call__(self, document: int) -> str:
        """Of one document."""
        part, inside = self._find(document)
        if part < 0:
            return self.earlier[part][inside]
        piece, line = self.places[part][inside].tolist()
        return self.locate(self.signed.records[part]["part"], piece, line)

    def _find(self, document: int) -> tuple[int, int]:
        """(its part, below 0 for runs of the index, which count from their end; its number in that)."""
        at = int(np.searchsorted(self.starts, document, "right")) - 1
        return at - len(self.earlier), document - int(self.starts[at])
