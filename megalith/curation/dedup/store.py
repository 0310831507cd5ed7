"""The signatures of all documents, mapped from the files that the parts and an index have written.

Documents are numbered: those of the index first, then those of the input in order. Memory holds some 40 bytes of each;
shingles and bands stay on the disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megalith.curation.dedup.signatures import DIGEST

CHUNK = 4 << 20  # shingles compared at once


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive documents: DIGEST [n], int32 [n] characters, and for near ones shingles, counts, bands [bands, n]."""

    digests: np.ndarray
    lengths: np.ndarray
    shingles: np.ndarray
    counts: np.ndarray
    bands: np.ndarray


class Store:
    """All documents, by number."""

    def __init__(self, pieces: Sequence[Piece]):
        """pieces: in order."""
        self.pieces = [piece for piece in pieces if len(piece.digests)]
        sizes = [len(piece.digests) for piece in self.pieces]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.digests = np.concatenate([np.zeros(0, DIGEST), *(piece.digests for piece in self.pieces)])
        self.lengths = np.concatenate([np.zeros(0, np.int32), *(piece.lengths for piece in self.pieces)])
        self.offsets = [np.concatenate([[0], np.cumsum(piece.counts, dtype=np.int64)]) for piece in self.pieces]

    def __len__(self) -> int:
        """Documents."""
        return int(self.starts[-1])

    def band(self, number: int) -> np.ndarray:
        """uint64 [documents]: a band of each."""
        return np.concatenate([piece.bands[number] for piece in self.pieces])

    def shingles(self, document: int) -> np.ndarray:
        """uint32, sorted: those of a document."""
        piece = int(np.searchsorted(self.starts, document, "right")) - 1
        offsets, inside = self.offsets[piece], document - int(self.starts[piece])
        return self.pieces[piece].shingles[offsets[inside] : offsets[inside + 1]]

    def similarity(self, a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
        """float64 [pairs]: the shingles that documents a and b have in common, over those of their union, of the
        smaller set ("min") or of the larger one ("max").
        """
        found: list[np.ndarray] = [np.zeros(0)]
        start = 0
        while start < len(a):
            sets: list[np.ndarray] = []
            size, stop = 0, start
            while stop < len(a) and (size < CHUNK or stop == start):
                sets += [self.shingles(int(a[stop])), self.shingles(int(b[stop]))]
                size, stop = size + len(sets[-1]) + len(sets[-2]), stop + 1
            found.append(_similarities(sets, kind))
            start = stop
        return np.concatenate(found)


def _similarities(sets: Sequence[np.ndarray], kind: str) -> np.ndarray:
    """Of sets 0 and 1, 2 and 3, ...: one sort finds what all pairs have in common."""
    sizes = np.fromiter(map(len, sets), np.int64, len(sets)).reshape(-1, 2)
    pair = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes.sum(1))
    keys = np.sort((pair << np.uint64(32)) | np.concatenate(sets))
    same = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)
    common = np.bincount(same.astype(np.int64), minlength=len(sizes))
    whole = {"union": sizes.sum(1) - common, "min": sizes.min(1), "max": sizes.max(1)}[kind]
    return common / np.maximum(whole, 1)
