"""Words of many texts at once, as numbers: where each begins and ends, its hash, hashes of n words in a row.

Deduplication and decontamination compare words without case. A loop over words in Python costs most of their time, so
all texts of a batch are one array of code points here, and every line below runs over all of its characters.

A word is a run of letters, marks, digits and underscores; a character of a script that is written without spaces
(Chinese, Japanese, Thai ...) is a word of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import unicodedata
from collections.abc import Sequence

import numpy as np

# First and last code points of scripts without spaces: Thai to Myanmar, Khmer, kana and Han.
WITHOUT_SPACES = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF),
)  # fmt: skip
# The code points among which Unicode has letters, marks and digits: asking for all 1.1 million takes half a second.
WITH_WORDS = (range(0x40000), range(0xE0000, 0xE1000))
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse mod 2^64
INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
NGRAM_MULTIPLIER = np.uint64(0xD1342543DE82EF95)


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of some texts, all in a row.

    hashes: uint64 [words]. starts, ends: int64 [words], characters in their own text. first: int64 [texts + 1]; the
    words of text i are first[i] to first[i + 1].
    """

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    first: np.ndarray


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Of each code point: 0 where it is of no word, 1 of a word, 2 a word of its own; and its lower case."""
    kinds = np.zeros(sys.maxunicode + 1, np.uint8)
    for planes in WITH_WORDS:
        found = (unicodedata.category(chr(i))[0] in "LMN" for i in planes)
        kinds[planes.start : planes.stop] = np.fromiter(found, np.uint8, len(planes))
    kinds[ord("_")] = 1
    for first, last in WITHOUT_SPACES:
        kinds[first : last + 1] *= 2
    lower = np.arange(len(kinds), dtype=np.uint32)
    for i in np.flatnonzero(kinds == 1).tolist():
        if len(low := chr(i).lower()) == 1:
            lower[i] = ord(low)
    return kinds, lower


def split_words(texts: Sequence[str]) -> Words:
    """The words of the texts."""
    kinds, lower = _tables()
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    # A zero behind each text, so that no word goes on in the next.
    joined = "\0".join(texts) + "\0"
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kind = kinds[points]
    before = np.concatenate([[np.uint8(0)], kind[:-1]])
    begins = (kind == 2) | ((kind == 1) & (before != 1))
    starts = np.flatnonzero(begins)
    after = np.concatenate([kind[1:], [np.uint8(0)]])
    ends = np.flatnonzero((kind == 2) | ((kind == 1) & (after != 1))) + 1
    text_starts = np.concatenate([[0], np.cumsum(lengths + 1)])
    first = np.searchsorted(starts, text_starts)
    own = np.repeat(text_starts[:-1], np.diff(first))
    return Words(_word_hashes(lower[points], starts, ends), starts - own, ends - own, first)


def _word_hashes(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A polynomial of each word's code points mod 2^64, by differences of one running sum, mixed."""
    powers = _powers(len(points) + 1)
    with np.errstate(over="ignore"):
        running = np.concatenate([[np.uint64(0)], np.cumsum((points + np.uint64(1)) * powers[:-1], dtype=np.uint64)])
        return mix((running[ends] - running[starts]) * _powers(len(points) + 1, inverse=True)[starts])


def _powers(count: int, inverse: bool = False) -> np.ndarray:
    """MULTIPLIER ** 0, 1, 2, ... mod 2^64, or those of its inverse."""
    return _stored_powers(1 << max(16, (count - 1).bit_length()), inverse)[:count]


@functools.lru_cache(maxsize=4)
def _stored_powers(count: int, inverse: bool) -> np.ndarray:
    steps = np.full(count, INVERSE if inverse else MULTIPLIER, np.uint64)
    steps[0] = 1
    with np.errstate(over="ignore"):
        return np.cumprod(steps, dtype=np.uint64)


def mix(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, one to one, every bit a function of all (splitmix64's finalizer; Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngram_hashes(hashes: np.ndarray, size: int) -> np.ndarray:
    """Hashes of `size` words in a row: uint64 [words - size + 1]; those that pass the end of a text are among them."""
    count = max(0, len(hashes) - size + 1)
    total = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(size):
            total = total * NGRAM_MULTIPLIER + hashes[i : i + count]
    return mix(total ^ np.uint64(size))


def within_texts(first: np.ndarray, size: int) -> np.ndarray:
    """bool [words - size + 1]: whether `size` words from here are all of one text. first: as Words has it."""
    count = max(0, int(first[-1]) - size + 1)
    inside = np.zeros(count + size, np.int64)
    used = np.diff(first) >= size
    np.add.at(inside, first[:-1][used], 1)
    np.add.at(inside, first[1:][used] - size + 1, -1)
    return np.cumsum(inside)[:count] > 0
