"""Which documents belong together: equal digests, and candidates that are verified to be similar; groups by union-find.

Candidates are documents that share a band. In each bucket of a band, the first document is compared with the others;
those that are not similar to it form a bucket of their own, and so on. So a bucket of a hundred thousand copies of one
page costs a comparison each, not one for each pair, and nothing is linked unverified.

The order in a bucket is that of the digests, never that of the input or of the workers: groups depend on the set of
documents alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from megalith.curation.dedup.store import Store

MAX_ROUNDS = 64  # documents of a bucket that others of it are compared with
MAX_REMEMBERED = 1 << 25  # pairs that were found dissimilar; more are compared again


@dataclasses.dataclass
class Groups:
    """Which documents belong together.

    label: int64 [documents], the group of each. twin, similarity: of each document the verified neighbour that it was
    first linked with (-1: none). compared: pairs whose similarity was computed.
    """

    label: np.ndarray
    twin: np.ndarray
    similarity: np.ndarray
    compared: int = 0
    unfinished: int = 0  # documents that MAX_ROUNDS left without a comparison in some bucket


def roots(label: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The representative of each group that `of` are in."""
    found = label[of]
    while (label[found] != found).any():
        found = label[found]
    return found


def unite(label: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Put a[i] and b[i] into one group, for every i. Every label points to a lower one, or to itself."""
    while True:
        x, y = roots(label, a), roots(label, b)
        apart = x != y
        if not apart.any():
            return
        low, high = np.minimum(x, y)[apart], np.maximum(x, y)[apart]
        np.minimum.at(label, high, low)


def exact_order(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(documents by digest, then by number; where each distinct digest begins)."""
    order = np.lexsort((digests["low"], digests["high"]))
    in_order = digests[order]
    new = np.ones(len(order), bool)
    new[1:] = (in_order["high"][1:] != in_order["high"][:-1]) | (in_order["low"][1:] != in_order["low"][:-1])
    return order, np.flatnonzero(new)


def find_groups(
    store: Store,
    bands: int,
    threshold: float,
    kind: str,
    progress: Callable[[int], None] = lambda band: None,
) -> Groups:
    """The groups of all documents. bands: 0 for equal digests alone. threshold: the least similarity of a link."""
    order, begins = exact_order(store.digests)
    # Work is on ranks: unique documents, numbered by their digests.
    documents = order[begins]
    label = np.arange(len(documents))
    twin, similarity = np.full(len(documents), -1), np.zeros(len(documents), np.float32)
    compared = unfinished = 0
    dissimilar = np.zeros(0, np.uint64)
    for band in range(bands):
        members, buckets = _buckets(store.band(band)[documents])
        for _ in range(MAX_ROUNDS):
            first = np.concatenate([[True], buckets[1:] != buckets[:-1]]) if len(buckets) else np.zeros(0, bool)
            head = members[first][np.cumsum(first) - 1]
            a, b, own = head[~first], members[~first], buckets[~first]
            if not len(a):
                break
            alone = roots(label, a) != roots(label, b)
            keys = (np.minimum(a, b).astype(np.uint64) << np.uint64(32)) | np.maximum(a, b).astype(np.uint64)
            unknown = alone & ~_contains(dissimilar, keys)
            found = np.zeros(len(a))
            found[unknown] = store.similarity(documents[a[unknown]], documents[b[unknown]], kind)
            compared += int(unknown.sum())
            alike = unknown & (found >= threshold)
            unite(label, a[alike], b[alike])
            for one, other in ((b, a), (a, b)):
                new = alike & (twin[one] < 0)
                twin[one[new]], similarity[one[new]] = other[new], found[new]
            if len(dissimilar) < MAX_REMEMBERED:
                dissimilar = np.union1d(dissimilar, keys[unknown & ~alike])
            rest = alone & ~alike
            members, buckets = b[rest], own[rest]
        else:
            unfinished += len(members)
        progress(band)
    return _of_documents(store, order, begins, documents, label, twin, similarity, compared, unfinished)


def _buckets(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ranks, bucket of each) of those that share their hash with another, by bucket and in it by rank."""
    order = np.argsort(hashes, kind="stable")
    in_order = hashes[order]
    same = in_order[1:] == in_order[:-1]
    shared = np.concatenate([same, [False]]) | np.concatenate([[False], same])
    starts = np.concatenate([[True], ~same])
    return order[shared], np.cumsum(starts)[shared]


def _contains(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Whether each key is among the sorted values."""
    if not len(values):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(values, keys), len(values) - 1)
    return values[at] == keys


def _of_documents(store, order, begins, documents, label, twin, similarity, compared, unfinished) -> Groups:
    """From unique documents to all: copies are in the group of their digest."""
    rank = np.zeros(len(store), np.int64)
    rank[order] = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(order))))
    twins = np.where(twin < 0, -1, documents[twin])
    return Groups(roots(label, np.arange(len(label)))[rank], twins[rank], similarity[rank], compared, unfinished)
