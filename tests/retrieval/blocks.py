"""Functions for --block-samples-mapping."""

import numpy as np


def documents(documents, lengths, title_lengths, *, num_samples, max_length, seed, one_sentence=False):
    """A block for each document, the last one first."""
    count = len(documents) - 1
    return np.stack([documents[:-1], documents[1:], np.arange(count), np.arange(count)], axis=1)[::-1]


def beginnings(documents, lengths, title_lengths, *, num_samples, max_length, seed, one_sentence=False):
    """A block for each document, its first sentence."""
    count = len(documents) - 1
    return np.stack([documents[:-1], documents[:-1] + 1, np.arange(count), np.arange(count)], axis=1)
