"""Megatron's three indices of a GPT dataset: documents in reading order, where samples begin, and the order of samples.

All documents of all epochs lie end to end; sample k covers the tokens k*s to k*s + s of them (s + 1 tokens, so
neighbours have one in common). In which document that token lies follows from the running sum of lengths, so no loop is
needed. The random numbers are drawn in Megatron's order (one RandomState, documents first, then samples), so the
indices are Megatron's to the last bit.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megalith.common.errors import DataError

BLOCK = 1 << 16  # documents at a time: half a megabyte of running sums, small enough for the CPU cache


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes that follow from a request, before anything is built. Its repr is in the cache key: keep the names."""

    begin: int  # first document
    end: int  # last document + 1
    tokens: int  # tokens of one epoch
    seq_length: int
    seed: int
    epochs: int
    samples: int  # all samples: at least as many as were requested
    whole: int  # samples that are shuffled together; the rest are those of a separate last epoch
    separate: bool  # the last epoch is shuffled by itself, because less than 80 % of it is needed


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


def build(plan: Plan, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document index [documents * epochs], sample index [samples + 1, 2] and shuffle index [samples].

    The functions below describe them. lengths: tokens of every sequence of the file.
    """
    random = np.random.RandomState(plan.seed)
    documents = document_index(plan, random)
    samples = sample_index(documents, lengths, plan.seq_length, plan.samples)
    return documents, samples, shuffle_index(plan, random)


def document_index(plan: Plan, random: np.random.RandomState) -> np.ndarray:
    """Every document once an epoch, shuffled over all epochs; a separate last epoch is shuffled by itself."""
    dtype = np.int32 if plan.end <= np.iinfo(np.int32).max else np.int64
    once = np.arange(plan.begin, plan.end, dtype=dtype)
    documents = np.tile(once, plan.epochs)
    edge = (plan.epochs - 1) * once.size if plan.separate else documents.size
    random.shuffle(documents[:edge])
    if plan.separate:
        random.shuffle(documents[edge:])
    return documents


def sample_index(documents: np.ndarray, lengths: np.ndarray, seq_length: int, samples: int) -> np.ndarray:
    """Where each sample begins, [samples + 1, 2].

    Row k is (index into `documents`, offset in that document) of token k * seq_length.
    """
    dtype = np.int32 if documents.size <= np.iinfo(np.int32).max else np.int64
    index = np.zeros((samples + 1, 2), dtype)  # row 0 is (0, 0), even where the first document is empty
    # in the file they are not aligned, and `take` would copy them each time
    lengths = np.require(lengths, requirements="A")
    row, before = 1, 0
    for begin in range(0, documents.size, BLOCK):
        sizes = lengths.take(documents[begin : begin + BLOCK])
        ends = np.cumsum(sizes, dtype=np.int64)
        ends += before
        before = int(ends[-1])
        # the last sample that begins by the end of each document
        last_sample = np.clip((ends - 1) // seq_length, row - 1, samples)
        document = np.repeat(np.arange(sizes.size), np.diff(last_sample, prepend=row - 1))
        stop = row + document.size
        index[row:stop, 0] = document + begin
        index[row:stop, 1] = np.arange(row, stop) * seq_length - (ends - sizes)[document]
        row = stop
    return index


def shuffle_index(plan: Plan, random: np.random.RandomState) -> np.ndarray:
    """The order in which samples are read; those of a separate last epoch come last."""
    order = np.arange(plan.samples, dtype=np.uint32 if plan.samples < 2**32 - 2 else np.int64)
    random.shuffle(order[: plan.whole])
    if plan.separate:
        random.shuffle(order[plan.whole :])
    return order
