"""Which sentences make a sample of BERT, T5 or ICT: Megatron's mappings, to the last draw.

A mapping walks through each document and ends a sample when it is long enough, so where one ends depends on what was
drawn before it. The end itself is a search in the running sum of lengths, so the work is one step per sample and not
one per sentence.
"""

from __future__ import annotations

import array
import bisect
from collections.abc import Iterator

import numpy as np

from megalith.common.errors import DataError
from megalith.data.samples.mersenne import mt19937, mt19937_64

LONG_SENTENCE = 512  # documents with a longer sentence are left out


def build_mapping(
    documents: np.ndarray,
    lengths: np.ndarray,
    *,
    num_samples: int | None,
    max_length: int,
    short_prob: float,
    seed: int,
    min_sentences: int,
) -> np.ndarray:
    """Rows (first sentence, last + 1, target length) for BERT and T5, shuffled; uint32 [samples, 3].

    They are uint64 where there are 2^32 sentences. documents: first sentence of each document, then the end. lengths:
    tokens of each sentence of the file. num_samples: whole epochs until there are so many; None for one epoch.
    short_prob: fraction of samples with a drawn target of 2 to max_length. min_sentences: 2 with a second segment, else
    1. Raises DataError where no document can give a sample.
    """
    counts, has_long = _sentences(documents, lengths)
    usable = np.flatnonzero((counts >= max(1, min_sentences)) & ~((counts > 1) & has_long))
    targets = _targets(max_length, short_prob, seed)
    rows = array.array("q")
    for _ in _epochs(rows, 3, num_samples, usable.size):
        for first, last, ends, base in _walk(documents, lengths, usable):
            start = first
            target = next(targets)
            while start < last:
                low = start - base + min_sentences
                end = bisect.bisect_left(ends, ends[start - base] + target, low, last - base) + base
                if last - end <= 1:  # a single sentence is not left over
                    end = last
                rows.extend((start, end, target))
                start = end
                target = next(targets)
    return _shuffled(rows, 3, lengths.size, seed)


def build_blocks(
    documents: np.ndarray,
    lengths: np.ndarray,
    title_lengths: np.ndarray,
    *,
    num_samples: int | None,
    max_length: int,
    seed: int,
    one_sentence: bool = False,
) -> np.ndarray:
    """Rows (first sentence, last + 1, document, block) for ICT, shuffled; uint32 [blocks, 4].

    A block and its title, of title_lengths[document] tokens, fill max_length. Blocks are numbered from 0 in every
    epoch. one_sentence: blocks of a single sentence are allowed. The other arguments are as in `build_mapping`.
    """
    minimum = 1 if one_sentence else 2
    counts, has_long = _sentences(documents, lengths)
    usable = np.flatnonzero((counts >= minimum) & ~has_long)
    rows = array.array("q")
    for _ in _epochs(rows, 4, num_samples, usable.size):
        block = 0
        for document, (first, last, ends, base) in zip(usable.tolist(), _walk(documents, lengths, usable)):
            start, target = first, max_length - int(title_lengths[document])
            while start < last:
                low = min(start - base + minimum, last - base)
                end = bisect.bisect_left(ends, ends[start - base] + target, low, last - base) + base
                if last - end < minimum:
                    end = last
                rows.extend((start, end, document, block))
                start, block = end, block + 1
    return _shuffled(rows, 4, lengths.size, seed)


def _sentences(documents: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sentences of each document, and whether one of them is too long."""
    counts = np.diff(documents)
    long_before = np.concatenate(([0], np.cumsum(lengths > LONG_SENTENCE)))
    return counts, np.diff(long_before[documents]) > 0


def _epochs(rows: array.array, width: int, num_samples: int | None, usable: int) -> Iterator[int]:
    """Count epochs until `rows` holds num_samples rows; None is one epoch."""
    if not usable:
        raise DataError(
            f"no document can give a sample: each has too few sentences or one of more than {LONG_SENTENCE} tokens; "
            f"preprocess with --split-sentences"
        )
    epoch = 0
    while epoch == 0 if num_samples is None else len(rows) < num_samples * width:
        yield epoch
        epoch += 1


def _walk(documents: np.ndarray, lengths: np.ndarray, usable: np.ndarray) -> Iterator[tuple[int, int, memoryview, int]]:
    """(first sentence, last + 1, running sum of lengths, sentence at which it is 0) of each usable document."""
    base = int(documents[0])
    ends = np.concatenate(([0], np.cumsum(lengths[base : int(documents[-1])], dtype=np.int64))).data
    for first, last in zip(documents[usable].tolist(), documents[usable + 1].tolist()):
        yield first, last, ends, base


def _targets(max_length: int, short_prob: float, seed: int) -> Iterator[int]:
    """Target lengths in the order of the draws; without short samples nothing is drawn."""
    ratio = int(1.0 / short_prob + 0.5) if short_prob > 0 else 0
    if ratio == 0:
        while True:
            yield max_length
    count, taken = 1 << 12, 0
    while True:  # when the draws run out, they are drawn again at twice the length: at most twice the work
        drawn = mt19937(seed, count)[taken:].astype(np.int64)
        yield from np.where(drawn % ratio == 0, 2 + drawn % (max_length - 1), max_length).tolist()
        count, taken = 2 * count, count


def _shuffled(rows: array.array, width: int, sentences: int, seed: int) -> np.ndarray:
    """The rows in the order of a Fisher-Yates shuffle that draws from mt19937_64(seed + 1)."""
    dtype = np.uint32 if sentences <= np.iinfo(np.uint32).max else np.uint64
    table = np.frombuffer(rows, np.int64).reshape(-1, width).astype(dtype)
    count = len(table)
    others = (mt19937_64(seed + 1, max(0, count - 1)) % np.arange(count, 1, -1, dtype=np.uint64)).tolist()
    order = list(range(count))
    for position, other in zip(range(count - 1, 0, -1), others):
        order[position], order[other] = order[other], order[position]
    return table[np.array(order, np.int64)]
