"""What deduplication knows of a document: a digest, its shingles, and the bands of its MinHash signature.

A shingle is a run of words (or characters); two documents are near-duplicates where the Jaccard similarity of their
sets of shingles is high (Broder, 1997). Signatures are rensa's R-MinHash (Fast Similarity Sketching: Dahlgaard et al.,
2017); `rows` of its values make a band, and documents that share a band are candidates (LSH: Indyk and Motwani, 1998).
The signature itself is not kept, because candidates are verified with the shingles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megalith.common.environment import one_thread_of_rensa
from megalith.common.extras import require
from megalith.curation.dedup.origins import Origins
from megalith.curation.documents import Document, groups_of
from megalith.curation.parts import PartOutput, Step
from megalith.curation.words import mix, ngram_hashes, split_words, within_texts

if TYPE_CHECKING:
    from megalith.curation.dedup.command import Dedup

DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])
URL = re.compile(r"^(?:[a-z][a-z0-9+.-]*:)?//(?:www\.)?|#.*$|/+$", re.IGNORECASE)
HOST = re.compile(r"[^/?]*")


def normal_url(url: str) -> str:
    """A URL without scheme, www., fragment and slashes at its end, its host in lower case."""
    url = URL.sub("", url.strip())
    host = HOST.match(url)[0]  # type: ignore[index]
    return host.lower() + url[len(host) :]


def digest(content: bytes) -> bytes:
    """The 16 bytes that stand for a content."""
    return hashlib.blake2b(content, digest_size=16).digest()


@dataclasses.dataclass
class Sign(Step):
    """Writes of each document, in order: digests, lengths, places, sources; and for near ones counts, shingles, bands.

    bands are [bands, documents of the part], so that one band of all documents is read without the others.
    """

    settings: Dedup
    name = "signatures"
    writes = False

    def load(self) -> None:
        """Import what computes signatures."""
        self.near = self.settings.by == "near"
        if self.near:
            self.rensa = _rensa()
        self._reset()

    def _reset(self) -> None:
        self.bands: list[np.ndarray] = []
        self.origins = Origins(self.settings.source_key, self.settings.id_key)

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Of a batch."""
        for group in groups_of(documents):
            texts = [document.text for document in group]
            self.origins.add(group, out)
            out.add("lengths", np.fromiter(map(len, texts), np.int32, len(texts)))
            if self.settings.by == "url":
                urls = [document.record.get(self.settings.url_key) for document in group]
                # One without a URL repeats none, neither of this run nor of those in an index.
                keys = [
                    (isinstance(url, str) and normal_url(url).encode())
                    or repr((out.job.key, out.number, document.where)).encode()
                    for url, document in zip(urls, group)
                ]
                out.write("digests", b"".join(map(digest, keys)))
            else:
                self._sign(texts, out)

    def _sign(self, texts: Sequence[str], out: PartOutput) -> None:
        words = split_words(texts)
        first, hashes = words.first, words.hashes.astype("<u8", copy=False)
        ends = first.tolist()
        contents = [
            hashes[start:end].tobytes() or text.encode("utf-8", "surrogatepass")
            for text, start, end in zip(texts, ends, ends[1:])
        ]
        out.write("digests", b"".join(map(digest, contents)))
        if not self.near:
            return
        documents, values = shingles(texts, words.hashes, first, self.settings.ngram_size, self.settings.ngram_unit)
        counts = np.bincount(documents, minlength=len(texts))
        out.add("counts", counts.astype(np.int32))
        out.add("shingles", values)
        self.bands.append(self._bands(values, counts))

    def _bands(self, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """uint64 [documents, bands]: a hash of the values of each band."""
        settings = self.settings
        size = settings.bands * settings.rows
        starts = np.concatenate([[0], np.cumsum(counts)])
        rows = self.rensa.digest_matrix_from_flat_token_hashes(
            mix(values.astype(np.uint64)), starts, size, settings.seed
        )
        flat = np.fromiter(itertools.chain.from_iterable(rows.to_rows()), np.uint64, len(counts) * size)
        signatures = flat.reshape(len(counts), settings.bands, settings.rows)
        total = np.zeros(signatures.shape[:2], np.uint64)
        for row in range(settings.rows):
            total = mix(total ^ signatures[:, :, row])
        return total

    def finish(self, out: PartOutput) -> None:
        """The bands of the part, and the names of its sources."""
        if self.bands:
            out.add("bands", np.concatenate(self.bands).T)
        self.origins.finish(out)
        self._reset()


def _rensa() -> Any:
    one_thread_of_rensa()  # workers are processes: threads of each would only take turns
    return require("rensa", "near-duplicates").RMinHash


def shingles(
    texts: Sequence[str], hashes: np.ndarray, first: np.ndarray, size: int, unit: str
) -> tuple[np.ndarray, np.ndarray]:
    """(index of the text, shingle) of all texts: int64 and uint32, sorted and each once.

    hashes, first: their words, as `split_words` gives them. size: words, or characters, of a shingle. A text that is
    shorter has one shingle, and so does one without words.
    """
    if unit == "character":
        hashes, first = _characters(texts)
    own = np.repeat(np.arange(len(texts)), np.diff(first))
    ngrams = ngram_hashes(hashes, size)
    inside = within_texts(first, size)
    documents, values = own[: len(ngrams)][inside], ngrams[inside].astype(np.uint32)
    short = np.flatnonzero(np.diff(first) < size).tolist()
    whole = [
        digest(hashes[first[i] : first[i + 1]].tobytes() or texts[i].encode("utf-8", "surrogatepass")) for i in short
    ]
    values = np.concatenate([values, np.frombuffer(b"".join(each[:4] for each in whole), "<u4")])
    documents = np.concatenate([documents, np.array(short, np.int64)])
    keys = np.sort((documents.astype(np.uint64) << np.uint64(32)) | values)
    keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
    return (keys >> np.uint64(32)).astype(np.int64), keys.astype(np.uint32)


def _characters(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Each character as a word; white space is one space, without case."""
    plain = [" ".join(text.lower().split()) for text in texts]
    points = np.frombuffer("".join(plain).encode("utf-32-le", "surrogatepass"), np.uint32)
    first = np.concatenate([[0], np.cumsum(np.fromiter(map(len, plain), np.int64, len(plain)))])
    return mix(points.astype(np.uint64) + np.uint64(1)), first
