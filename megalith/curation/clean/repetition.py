"""Gopher's rules on repetition (Rae et al., 2021, table A1).

n-grams are of words without case and punctuation, and their characters are those of their words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megalith.curation.clean.rules import Text
from megalith.curation.words import ngram_hashes

MAX_DUPLICATES, MAX_DUPLICATE_CHARACTERS = 0.3, 0.2  # of lines or paragraphs, and of their characters
TOP_NGRAMS = {2: 0.2, 3: 0.18, 4: 0.16}  # size -> the most characters that the most frequent one may have
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}  # ... that repeated ones may have


def duplicates(pieces: Sequence[str]) -> tuple[int, int]:
    """How many pieces occurred before, and their characters."""
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count, characters = count + 1, characters + len(piece)
        seen.add(piece)
    return count, characters


def duplicate_lines(text: Text) -> str:
    """More than 30 % of the lines occurred before."""
    return _count(text.lines, "lines")


def duplicate_paragraphs(text: Text) -> str:
    """More than 30 % of the paragraphs occurred before."""
    return _count(text.paragraphs, "paragraphs")


def duplicate_line_characters(text: Text) -> str:
    """More than 20 % of the characters are in lines that occurred before."""
    return _characters(text.lines, len(text.text), "lines")


def duplicate_paragraph_characters(text: Text) -> str:
    """More than 20 % of the characters are in paragraphs that occurred before."""
    return _characters(text.paragraphs, len(text.text), "paragraphs")


def _count(pieces: Sequence[str], name: str) -> str:
    count, _ = duplicates(pieces)
    return f"{count} of {len(pieces)} {name} repeated" if count > MAX_DUPLICATES * len(pieces) else ""


def _characters(pieces: Sequence[str], total: int, name: str) -> str:
    _, characters = duplicates(pieces)
    return f"{characters / total:.1%} in repeated {name}" if characters > MAX_DUPLICATE_CHARACTERS * total else ""


def top_ngrams(text: Text) -> str:
    """The most frequent 2-gram, 3-gram or 4-gram has more than 20, 18 or 16 % of the characters."""
    lengths = text.word_lengths
    total = int(lengths.sum())
    for size, most in TOP_NGRAMS.items():
        ngrams = ngram_hashes(text.hashed.hashes, size)
        found, counts = np.unique(ngrams, return_counts=True)
        if not len(found) or (count := int(counts.max())) < 2:
            break  # no longer one can be there twice either
        start = int(np.flatnonzero(ngrams == found[counts.argmax()])[0])
        share = count * int(lengths[start : start + size].sum()) / total
        if share > most:
            return f"one {size}-gram has {share:.1%}"
    return ""


def duplicate_ngrams(text: Text) -> str:
    """5-grams ... 10-grams that occurred before have more than 15 ... 10 % of the characters."""
    lengths = text.word_lengths
    total = int(lengths.sum())
    for size, most in DUPLICATE_NGRAMS.items():
        ngrams = ngram_hashes(text.hashed.hashes, size)
        in_order = np.sort(ngrams)
        if not (in_order[1:] == in_order[:-1]).any():
            break
        _, first = np.unique(ngrams, return_index=True)  # slow: it sorts positions
        covered = np.zeros(len(lengths) + 1, np.int64)
        repeated = np.setdiff1d(np.arange(len(ngrams)), first, assume_unique=True)
        np.add.at(covered, repeated, 1)
        np.add.at(covered, repeated + size, -1)
        share = int(lengths[np.cumsum(covered)[:-1] > 0].sum()) / total
        if share > most:
            return f"repeated {size}-grams have {share:.1%}"
    return ""
