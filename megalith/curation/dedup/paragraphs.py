"""Documents without the paragraphs that are not there for the first time, in any document; the evidence of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from megalith.curation.dedup.occurrences import FirstPlaces
from megalith.curation.dedup.origins import Names, Origins
from megalith.curation.documents import Document, dump
from megalith.curation.parts import PartOutput, Step
from megalith.curation.run import Pass
from megalith.curation.words import mix, split_words


def paragraphs_of(text: str) -> list[str]:
    """What line ends separate: paragraphs of crawled pages have one between them, those of books two."""
    return text.split("\n")


@dataclasses.dataclass
class SignParagraphs(Step):
    """Writes the hash of each paragraph of at least `fewest` words, 0 for shorter ones; a paragraph is a line.

    And of each document how many it has, and where it is from (source_key, id_key: as Origins takes them).
    """

    fewest: int
    source_key: str
    id_key: str
    name = "paragraphs"
    writes = False

    def load(self) -> None:
        """No source is known."""
        self.origins = Origins(self.source_key, self.id_key)

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Of a batch."""
        self.origins.add(documents, out)
        numbers = []
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
            numbers.append(len(counts))
        out.add("numbers", np.array(numbers, np.int64))
        out.count("paragraphs", sum(numbers))

    def finish(self, out: PartOutput) -> None:
        """The names of the part's sources."""
        self.origins.finish(out)


@dataclasses.dataclass
class DropParagraphs(Step):
    """Documents without the paragraphs that are not there for the first time; one that loses all is dropped.

    first: file of an int64 for each paragraph, as `first_occurrences` writes it. starts: the number of the first
    paragraph of each part.
    """

    first: str
    starts: dict[int, int]
    name = "paragraphs"

    def load(self) -> None:
        """Map the file."""
        self.first_places = FirstPlaces(self.first, self.starts)

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Take repeated paragraphs out."""
        self.first_places.begin(out)
        for document in documents:
            paragraphs = paragraphs_of(document.text)
            stays = self.first_places.take(len(paragraphs))
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


@dataclasses.dataclass(frozen=True)
class Removals:
    """What becomes of the paragraphs of a corpus. signed: what SignParagraphs gave. first: int64 [paragraphs]."""

    signed: Pass
    first: np.ndarray

    def _pieces(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Of each part: its first document and paragraph, hashes, how many paragraphs each document has."""
        document = paragraph = 0
        for record in self.signed.records:
            hashes = self.signed.array(record, "paragraphs", np.uint64)
            numbers = self.signed.array(record, "numbers", np.int64)
            yield document, paragraph, hashes, numbers
            document, paragraph = document + len(numbers), paragraph + len(hashes)

    def by_source(self, source: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        """int [sources] each: paragraphs that are long enough to be compared, and those of them that are removed.

        source: of each document. number: of sources.
        """
        total, lost = np.zeros(number, np.int64), np.zeros(number, np.int64)
        for document, paragraph, hashes, numbers in self._pieces():
            own = np.repeat(source[document : document + len(numbers)], numbers)
            places = np.arange(paragraph, paragraph + len(hashes))
            total += np.bincount(own[hashes != 0], minlength=number)
            lost += np.bincount(own[self.first[paragraph : paragraph + len(hashes)] != places], minlength=number)
        return total, lost

    def write(self, path: str, name: Names, source_names: Sequence[str], source: np.ndarray) -> None:
        """A line for each paragraph that is removed: where it is, and where it is for the first time."""
        counts = np.concatenate([np.zeros(0, np.int64), *(numbers for *_, numbers in self._pieces())])
        starts = np.concatenate([[0], np.cumsum(counts)])

        def located(paragraph: int) -> tuple[int, int]:
            document = int(np.searchsorted(starts, paragraph, "right")) - 1
            return document, paragraph - int(starts[document]) + 1

        with open(path, "wb") as out:
            for _, begin, hashes, _ in self._pieces():
                first = self.first[begin : begin + len(hashes)]
                for inside in np.flatnonzero(first != np.arange(begin, begin + len(hashes))).tolist():
                    document, number = located(begin + inside)
                    kept, kept_number = located(int(first[inside]))
                    line = name.described(document, "document") | {"rule": "paragraph", "paragraph": number}
                    line |= name.described(kept, "kept") | {"kept_paragraph": kept_number}
                    line["source"] = source_names[source[document]]
                    out.write(dump(line) + b"\n")
