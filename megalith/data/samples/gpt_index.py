"""Megatron's three indices of a GPT dataset: documents in reading order, where each sample begins, and the order of samples.

All documents of all epochs lie end to end; sample k covers the tokens k*s to k*s + s of them (s + 1 tokens, so neighbours share one).
In which document that token lies follows from the running sum of lengths, so no loop is needed. The random numbers are drawn in
Megatron's order (one RandomState, documents first, then samples), so the indices are Megatron's to the last bit.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megalith.common.errors import DataError

BLOCK = 1 << 16  # documents looked at together: half a megabyte of running sums, small enough for the cache


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes that follow from a request, before anything is built."""

    begin: int  # first document
    end: int  # last document + 1
    tokens: int  # tokens of one epoch
    seq_length: int
    seed: int
    epochs: int
    samples: int  # what there is: at least what was asked for
    whole: int  # samples that are shuffled together; the rest are those of a last epoch kept apart
    separate: bool  # the last epoch is kept apart: less than 80 % of it is needed


def plan(begin: int, end: int, tokens: int, num_samples: int | None, seq_length: int, seed: int) -> Plan:
    """Epochs and samples for `num_samples` (None: one epoch) from documents begin to end - 1 holding `tokens` tokens.

    Raises DataError when there is nothing to make a sample of.
    """
    if tokens < 1:
        raise DataError(
            f"documents {begin} to {end} hold no tokens, so no sample of {seq_length} tokens can be cut from them"
        )
    epochs = 1 if num_samples is None else max(1, -(-(num_samples * seq_length + 1) // tokens))
    samples = (epochs * tokens - 1) // seq_length
    if samples == 0 and num_samples != 0:
        raise DataError(
            f"documents {begin} to {end} hold {tokens} tokens; one sample takes {seq_length + 1}. Shorten --seq-length"
        )
    whole, separate = samples, False
    if epochs > 1 and num_samples is not None:
        before = ((epochs - 1) * tokens - 1) // seq_length
        separate = num_samples - before < int(0.80 * ((tokens - 1) // seq_length))
        whole = before if separate else samples
    return Plan(begin, end, tokens, seq_length, seed, epochs, samples, whole, separate)


def build(of: Plan, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document index [documents * epochs], sample index [samples + 1, 2] and shuffle index [samples], as the functions below make them.

    lengths: tokens of every sequence of the file.
    """
    random = np.random.RandomState(of.seed)
    documents = document_index(of, random)
    samples = sample_index(documents, lengths, of.seq_length, of.samples)
    return documents, samples, shuffle_index(of, random)


def document_index(of: Plan, random: np.random.RandomState) -> np.ndarray:
    """Every document once an epoch, shuffled over all epochs; a last epoch that is kept apart is shuffled by itself."""
    kind = np.int32 if of.end <= np.iinfo(np.int32).max else np.int64
    once = np.arange(of.begin, of.end, dtype=kind)
    documents = np.tile(once, of.epochs)
    edge = (of.epochs - 1) * once.size if of.separate else documents.size
    random.shuffle(documents[:edge])
    if of.separate:
        random.shuffle(documents[edge:])
    return documents


def sample_index(documents: np.ndarray, lengths: np.ndarray, seq_length: int, samples: int) -> np.ndarray:
    """Where each sample begins: row k is (place in `documents`, offset in that document) of token k * seq_length; [samples + 1, 2]."""
    kind = np.int32 if documents.size <= np.iinfo(np.int32).max else np.int64
    index = np.zeros((samples + 1, 2), kind)  # row 0 is (0, 0), even where the first document is empty
    lengths = np.require(
        lengths, requirements="A"
    )  # in the file they are not aligned, and `take` would copy them each time
    row, before = 1, 0
    for begin in range(0, documents.size, BLOCK):
        sizes = lengths.take(documents[begin : begin + BLOCK])
        ends = np.cumsum(sizes, dtype=np.int64)
        ends += before
        before = int(ends[-1])
        upto = np.clip(
            (ends - 1) // seq_length, row - 1, samples
        )  # the last sample that begins by the end of each document
        place = np.repeat(np.arange(sizes.size), np.diff(upto, prepend=row - 1))
        stop = row + place.size
        index[row:stop, 0] = place + begin
        index[row:stop, 1] = np.arange(row, stop) * seq_length - (ends - sizes)[place]
        row = stop
    return index


def shuffle_index(of: Plan, random: np.random.RandomState) -> np.ndarray:
    """The order in which samples are read; those of a last epoch that is kept apart come last."""
    order = np.arange(of.samples, dtype=np.uint32 if of.samples < 2**32 - 2 else np.int64)
    random.shuffle(order[: of.whole])
    if of.separate:
        random.shuffle(order[of.whole :])
    return order
