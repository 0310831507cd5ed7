"""The two random streams of C++ that Megatron's sample mappings draw from: std::mt19937 and std::mt19937_64."""

from __future__ import annotations

import numpy as np

STATE_WORDS, MIDDLE = 312, 156  # of mt19937_64: words of state, and the distance of the word that is mixed in
UPPER_MASK, LOWER_MASK, TWIST = np.uint64(0xFFFFFFFF80000000), np.uint64(0x7FFFFFFF), np.uint64(0xB5026F5AA96619E9)


def mt19937(seed: int, count: int) -> np.ndarray:
    """The first `count` numbers of std::mt19937(seed), uint32. numpy's legacy generator is the same, seeded alike."""
    return np.random.RandomState(seed).randint(0, 2**32, count, dtype=np.uint32)


def mt19937_64(seed: int, count: int) -> np.ndarray:
    """The first `count` numbers of std::mt19937_64(seed), uint64, 312 at a time (Nishimura, ACM TOMACS 10, 2000)."""
    words, word = [], seed & (2**64 - 1)
    for index in range(STATE_WORDS):
        words.append(word)
        word = (6364136223846793005 * (word ^ (word >> 62)) + index + 1) & (2**64 - 1)
    state, out = np.array(words, np.uint64), np.empty((-(-count // STATE_WORDS), STATE_WORDS), np.uint64)
    for row in out:
        row[:MIDDLE] = state[MIDDLE:] ^ _twist(state[:MIDDLE], state[1 : MIDDLE + 1])
        row[MIDDLE:-1] = row[: MIDDLE - 1] ^ _twist(state[MIDDLE:-1], state[MIDDLE + 1 :])
        # the last word is already mixed with the new first one
        row[-1:] = row[MIDDLE - 1 : MIDDLE] ^ _twist(state[-1:], row[:1])
        state = row
    words64 = out.reshape(-1)[:count].copy()
    for shift, mask in (
        (29, 0x5555555555555555),
        (-17, 0x71D67FFFEDA60000),
        (-37, 0xFFF7EEE000000000),
        (43, 2**64 - 1),
    ):
        shifted = words64 >> np.uint64(shift) if shift > 0 else words64 << np.uint64(-shift)
        words64 ^= shifted & np.uint64(mask)
    return words64


def _twist(word: np.ndarray, following: np.ndarray) -> np.ndarray:
    mixed = (word & UPPER_MASK) | (following & LOWER_MASK)
    return (mixed >> np.uint64(1)) ^ np.where(mixed & np.uint64(1), TWIST, np.uint64(0))
