"""The nearest vectors of a store: exactly, and approximately by FAISS (Johnson et al., 2017).

Exact search reads every vector. It is what approximate indices are measured against. Scores are float32 products of
float16 vectors, or their negative squared distances where the settings of the store say "metric": "l2"; of equal scores
the smaller row comes first.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megalith.common.errors import ConfigError, DataError, problem
from megalith.common.extras import require
from megalith.common.files import atomic_path, sha256, write_text
from megalith.common.memory import available_memory
from megalith.config.flags.text import Words
from megalith.retrieval.store import Store, faiss_damage

CHUNK = 1 << 16  # vectors whose scores exist at one time
QUERIES = 1024  # queries whose scores exist at one time
SEED = 1234  # of the sample that an approximate index is trained on


class ExactIndex:
    """Every vector is compared. cache: keep them in memory as float32 where half of what is free holds them."""

    def __init__(self, store: Store, cache: bool = True):
        self.store = store
        fits = 4 * len(store) * store.width < available_memory() // 2
        self.cached = [(first, _floats(part)) for first, part in store.chunks(CHUNK)] if cache and fits else None

    def search(self, queries: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """queries float32 [n, p] -> (scores float32, rows int64), each [n, min(k, vectors)], the best first."""
        _check_width(queries, self.store)
        parts = [self._search(part, min(k, len(self.store))) for part in queries.float().split(QUERIES)]
        scores, rows = (torch.cat(column).numpy() for column in zip(*parts))
        return scores, rows

    def _search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        best, rows = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        chunks = self.cached or ((first, _floats(part)) for first, part in self.store.chunks(CHUNK))
        for first, vectors in chunks:
            scores = queries @ vectors.t()
            if by_distance(self.store):
                scores = 2 * scores - vectors.square().sum(dim=1) - queries.square().sum(dim=1, keepdim=True)
            found, where = scores.topk(min(k, scores.shape[1]), dim=1)
            as_good = (scores >= found[:, -1:]).sum(dim=1)
            if (as_good > found.shape[1]).any():  # equal ones, of which topk takes any
                found, where = (part[:, :k] for part in scores.sort(dim=1, descending=True, stable=True))
            best, rows = torch.cat((best, found), dim=1), torch.cat((rows, where + first), dim=1)
            # by row, then stably by score: of equal scores the smaller row comes first
            rows, order = rows.sort(dim=1)
            best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
            best, rows = best[:, :k], rows.gather(1, order)[:, :k]
        return best, rows


def _floats(part: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(part)).float()


def _check_width(queries: torch.Tensor, store: Store) -> None:
    if queries.shape[1] != store.width:
        rule = f"must have {store.width} elements, as those of {store.folder}"
        cure = "Name the model that made the index"
        raise DataError(problem("Vectors of queries", Words(f"{queries.shape[1]}"), rule, cure))


def by_distance(store: Store) -> bool:
    """Whether vectors are compared by their distance, and not by their dot product."""
    return store.plan.settings.get("metric") == "l2"


class FaissIndex:
    """An index of FAISS over a store, in a file of its folder."""

    def __init__(self, store: Store, index_string: str):
        """Open the index that `build_faiss` wrote. Raises DataError where it is not there or of another store."""
        self.store, self.path = store, faiss_path(store, index_string)
        if not self.path.exists():
            cure = f"Give {store.plan.command} --index-string {index_string} again"
            raise DataError(problem("The FAISS index", str(self.path), "must be built first", cure))
        faiss = require("faiss", f"--index-string {index_string}")
        try:
            self.index = faiss.read_index(str(self.path))
        except RuntimeError as error:
            raise DataError(f"{self.path} is damaged ({str(error)[:100]}). Delete it, and build it again.") from None
        if (self.index.ntotal, self.index.d) != (len(store), store.width):
            found = Words(f"{self.index.ntotal} vectors of {self.index.d}")
            rule = f"must hold the {len(store)} vectors of {store.width} that the store has"
            raise DataError(problem(str(self.path), found, rule, "Delete it, and build it again"))

    def set_options(self, **options: int) -> None:
        """Options of FAISS for a search, such as efSearch and nprobe; those that this index lacks are left out."""
        faiss: Any = require("faiss", "--index-string")
        for name, value in options.items():
            with contextlib.suppress(RuntimeError):
                faiss.ParameterSpace().set_index_parameter(self.index, name, value)

    def search(self, queries: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As ExactIndex; a row of -1 where the index found fewer."""
        _check_width(queries, self.store)
        scores, rows = self.index.search(queries.float().contiguous().numpy(), min(k, len(self.store)))
        return (-scores if by_distance(self.store) else scores), rows


def open_index(store: Store, index_string: str | None, cache: bool = True) -> ExactIndex | FaissIndex:
    """The index of FAISS that is named, or an exact one."""
    return FaissIndex(store, index_string) if index_string else ExactIndex(store, cache)


def faiss_path(store: Store, index_string: str) -> pathlib.Path:
    """The file of an approximate index."""
    return store.folder / f"faiss-{re.sub('[^A-Za-z0-9_,.]', '-', index_string)}.index"


def build_faiss(
    store: Store, index_string: str, *, train_rows: int = 100_000, notice: Callable[[str], None] = lambda line: None
) -> FaissIndex:  # fmt: skip
    """Build the index that FAISS calls by this name (Flat, IVF256,Flat, HNSW32, IVF1024,PQ32, ...), unless it is there.

    It is trained on `train_rows` vectors drawn from the whole store, and given the vectors chunk by chunk. Memory: the
    index, and the sample. Raises ConfigError for a name that FAISS does not know, or that asks for too many vectors.
    """
    path = faiss_path(store, index_string)
    if path.exists() and (what := faiss_damage(path)) is None:
        notice(f"{path} is there already")
        return FaissIndex(store, index_string)
    if path.exists():
        notice(f"{path} {what}: it is built again")
    faiss: Any = require("faiss", f"--index-string {index_string}")
    example = "Write --index-string Flat, IVF256,Flat or HNSW32"
    try:
        metric = faiss.METRIC_L2 if by_distance(store) else faiss.METRIC_INNER_PRODUCT
        index = faiss.index_factory(store.width, index_string, metric)
    except RuntimeError:
        rule = f"must be an index of FAISS for vectors of {store.width}"
        raise ConfigError(problem("--index-string", index_string, rule, example)) from None
    if not index.is_trained:
        sample = np.sort(np.random.RandomState(SEED).permutation(len(store))[:train_rows])
        lists = faiss.extract_index_ivf(index).nlist if index_string.startswith("IVF") else 1
        if len(sample) < lists:
            rule = f"must have at most {len(sample)} lists, one for each vector that it is trained on"
            raise ConfigError(problem("--index-string", index_string, rule, "Write a smaller number after IVF"))
        try:
            index.train(store.vectors(sample))
        except RuntimeError as error:
            rule = f"must be trainable on {len(sample)} vectors ({str(error).rsplit(':', 1)[-1].strip()[:80]})"
            raise ConfigError(problem("--index-string", index_string, rule, example)) from None
    for _, part in store.chunks(CHUNK):
        index.add(np.ascontiguousarray(part, np.float32))
    with atomic_path(path) as temporary:
        faiss.write_index(index, os.fspath(temporary))
        checksum = sha256(temporary)
    write_text(path.with_suffix(".json"), json.dumps({"sha256": checksum}) + "\n")
    return FaissIndex(store, index_string)


def recall(exact: np.ndarray, found: np.ndarray) -> float:
    """The share of the rows [n, k] of an exact search that an approximate one found too."""
    hits = sum(len(np.intersect1d(one, other)) for one, other in zip(exact, found))
    return hits / max(1, exact.size)


def measure_recall(store: Store, index: FaissIndex, k: int = 20, queries: int = 200) -> float:
    """Recall of an approximate index, with vectors of the store, drawn by a seed, as queries."""
    rows = np.sort(np.random.RandomState(SEED + 1).permutation(len(store))[:queries])
    vectors = torch.from_numpy(store.vectors(rows))
    return recall(ExactIndex(store, cache=False).search(vectors, k)[1], index.search(vectors, k)[1])
