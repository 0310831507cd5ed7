"""n-grams of task texts, and where a text of the corpus has them.

Words are those of curation/words.py. Task texts give their n-grams of `longest` words (13: Brown et al., 2020, appendix
C); a text with fewer words, but at least `shortest`, is one n-gram.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from megalith.curation.words import ngram_hashes, split_words, within_texts


@dataclasses.dataclass(frozen=True)
class TaskNgrams:
    """hashes: {size: uint64 [n], sorted, each once}. owners: {size: int32 [n]}, the task that has each first."""

    names: tuple[str, ...]
    hashes: dict[int, np.ndarray]
    owners: dict[int, np.ndarray]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(map(len, self.hashes.values()))

    def starts(self) -> dict[int, int]:
        """The number of the first one of each size; they are numbered over all sizes."""
        sizes = sorted(self.hashes)
        ends = np.cumsum([0, *(len(self.hashes[size]) for size in sizes)])
        return dict(zip(sizes, ends.tolist()))

    def only(self, wanted: np.ndarray) -> TaskNgrams:
        """Those whose numbers are wanted, bool [count]; they get new numbers."""
        masks = {size: wanted[start : start + len(self.hashes[size])] for size, start in self.starts().items()}
        masks = {size: mask for size, mask in masks.items() if mask.any()}
        hashes = {size: self.hashes[size][mask] for size, mask in masks.items()}
        return TaskNgrams(self.names, hashes, {size: self.owners[size][mask] for size, mask in masks.items()})


def task_ngrams(tasks: Mapping[str, Sequence[str]], longest: int, shortest: int) -> TaskNgrams:
    """The n-grams of all tasks."""
    found: dict[int, list[np.ndarray]] = {}
    owned: dict[int, list[np.ndarray]] = {}
    for number, texts in enumerate(tasks.values()):
        words = split_words(list(texts))
        counts = np.diff(words.first)
        for size in range(shortest, longest + 1):
            ngrams = ngram_hashes(words.hashes, size)[within_texts(words.first, size)]
            if size < longest:  # a text of exactly so many words
                first = words.first[:-1][counts == size]
                ngrams = ngram_hashes(words.hashes, size)[first]
            found.setdefault(size, []).append(ngrams)
            owned.setdefault(size, []).append(np.full(len(ngrams), number, np.int32))
    hashes, owners = {}, {}
    for size in found:
        values, first = np.unique(np.concatenate(found[size]), return_index=True)
        if len(values):
            hashes[size], owners[size] = values, np.concatenate(owned[size])[first]
    return TaskNgrams(tuple(tasks), hashes, owners)


@dataclasses.dataclass(frozen=True)
class Match:
    """One n-gram in a text: characters start to end, the number of the n-gram, its size."""

    text: int
    start: int
    end: int
    number: int
    size: int


def find_matches(texts: Sequence[str], ngrams: TaskNgrams) -> list[Match]:
    """Every n-gram of the tasks in the texts, by text and start; hashes of 64 bits stand for the words."""
    words = split_words(texts)
    matches = []
    for size, first_number in ngrams.starts().items():
        known = ngrams.hashes[size]
        hashes = ngram_hashes(words.hashes, size)
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        places = np.flatnonzero((known[at] == hashes) & within_texts(words.first, size))
        owners = np.searchsorted(words.first, places, "right") - 1
        for place, text in zip(places.tolist(), owners.tolist()):
            start, end = int(words.starts[place]), int(words.ends[place + size - 1])
            matches.append(Match(text, start, end, first_number + int(at[place]), size))
    return sorted(matches, key=lambda each: (each.text, each.start, -each.size))
