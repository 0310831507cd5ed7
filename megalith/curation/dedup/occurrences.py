"""Which of many values are there for the first time, out of core; and documents without their repeated paragraphs."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from megalith.curation.documents import Document
from megalith.curation.parts import PartOutput, Step
from megalith.curation.words import mix, split_words

AT_ONCE = 1 << 24  # values in memory


def first_occurrences(values: Callable[[], Iterable[np.ndarray]], count: int, path: pathlib.Path) -> np.ndarray:
    """bool [count], in a file at `path`: whether a value was not there before; 0 is no value, and always new.

    values: called for the uint64 values in pieces, in order. They are sorted range by range, AT_ONCE of them or so, so
    that memory does not grow with their number.
    """
    first = np.memmap(path, bool, "w+", shape=(max(1, count),))[:count]
    ranges = max(1, -(-count // AT_ONCE))
    for number in range(ranges):
        found, places, start = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
        for piece in values():
            # Values may be anything, hashes too, so they are mixed before they are cut into ranges.
            inside = np.flatnonzero((piece != 0) & (mix(piece) % np.uint64(ranges) == number))
            if number == 0:
                first[start : start + len(piece)] = piece == 0
            found.append(piece[inside])
            places.append(inside + start)
            start += len(piece)
        order = np.argsort(all_values := np.concatenate(found), kind="stable")
        in_order = all_values[order]
        new = np.concatenate([[True], in_order[1:] != in_order[:-1]])[: len(in_order)]
        first[np.concatenate(places)[order[new]]] = True
    return first


def paragraphs_of(text: str) -> list[str]:
    """What line ends separate: paragraphs of crawled pages have one between them, those of books two."""
    return text.split("\n")


@dataclasses.dataclass
class SignParagraphs(Step):
    """Writes the hash of each paragraph of at least `fewest` words, 0 for shorter ones; a paragraph is a line."""

    fewest: int
    name = "paragraphs"
    writes = False

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Of a batch."""
        for document in documents:
            words = split_words(paragraphs_of(document.text))
            counts = np.diff(words.first)
            totals = np.zeros(len(counts), np.uint64)
            place = np.arange(len(words.hashes)) - np.repeat(words.first[:-1], counts)
            with np.errstate(over="ignore"):
                np.add.at(
                    totals, np.repeat(np.arange(len(counts)), counts), mix(words.hashes + place.astype(np.uint64))
                )
            hashes = mix(totals)
            hashes[(counts < self.fewest) | (counts == 0)] = 0
            out.add("paragraphs", hashes)
            out.count("paragraphs", len(counts))


@dataclasses.dataclass
class DropParagraphs(Step):
    """Documents without the paragraphs that are not there for the first time; one that loses all is dropped.

    first: file of a bool for each paragraph. starts: the number of the first paragraph of each part.
    """

    first: str
    starts: dict[int, int]
    name = "paragraphs"

    def load(self) -> None:
        """Map the file."""
        self.is_first = np.memmap(self.first, bool, "r")
        self.part, self.at = -1, 0

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Take repeated paragraphs out."""
        if out.number != self.part or out.position == 0:
            self.part, self.at = out.number, self.starts[out.number]
        for document in documents:
            paragraphs = paragraphs_of(document.text)
            stays = self.is_first[self.at : self.at + len(paragraphs)]
            self.at += len(paragraphs)
            if stays.all():
                out.keep(document)
                continue
            gone = [paragraph for paragraph, keep in zip(paragraphs, stays) if not keep]
            text = "\n".join(paragraph for paragraph, keep in zip(paragraphs, stays) if keep).strip("\n")
            out.count("repeated paragraphs", len(gone))
            if not text.strip():
                out.drop(document, "paragraphs", "all of its paragraphs are repeated")
                continue
            out.note(
                document, "repeated_paragraph", f"{len(gone)} of {len(paragraphs)}: {gone[0][:80]}", document.text, text
            )
            out.keep(document.with_text(text))
