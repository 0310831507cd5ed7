"""`megalith data sample`: a random part of the documents, of every stratum (a source, a language ...) alike.

Which documents are chosen is a function of the seed and of their places in the input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.curation.documents import Document
from megalith.curation.parts import PartOutput, Step
from megalith.curation.run import Command, Run
from megalith.curation.settings import SampleSettings
from megalith.curation.shuffle import random_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(SampleSettings, Command):
    """The step `megalith data sample`."""

    name = "sample"

    def check(self) -> None:
        """Raise ConfigError unless the size is given once."""
        if bool(self.rate) == bool(self.documents) or self.rate > 1:
            rule = "must be a share of at most 1, or --documents a number; one of them"
            found = Words(f"--rate {self.rate} and --documents {self.documents}")
            raise ConfigError(problem("--rate", found, rule, "Give one"))

    def run(self, run: Run) -> dict[str, Any]:
        """Find strata, choose, write."""
        seen = run.step_pass(Strata(self.by), "strata")
        known: dict[str, int] = {}
        numbers = [
            np.array([known.setdefault(name, len(known)) for name in record["strata"]], np.int64)
            for record in seen.records
        ]
        strata = [own[seen.array(record, "numbers", np.int32)] for own, record in zip(numbers, seen.records)]
        keys = [random_keys(self.seed, record["part"], 0, record["documents"]) for record in seen.records]
        chosen = choose(np.concatenate(strata), np.concatenate(keys), self.rate, self.documents)
        path = (run.folder / "chosen.bin").resolve()
        chosen.tofile(path)
        done = run.step_pass(Chosen(str(path), seen.starts("documents")), "chosen", final=True)
        run.assemble(done)
        sizes = np.bincount(np.concatenate(strata)[chosen], minlength=len(known))
        table = {name: int(sizes[number]) for name, number in list(known.items())[:1000]}
        return {"kept": done.total("kept"), "kept_bytes": done.total("kept_bytes"), "strata": table}


def choose(strata: np.ndarray, keys: np.ndarray, rate: float, documents: int) -> np.ndarray:
    """bool [documents]: of each stratum those with the smallest keys."""
    order = np.lexsort((keys, strata))
    sizes = np.bincount(strata)
    place = np.arange(len(strata)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    wanted = np.array([min(size, documents) if documents else math.ceil(size * rate) for size in sizes.tolist()])
    chosen = np.zeros(len(strata), bool)
    chosen[order] = place < np.repeat(wanted, sizes)
    return chosen


@dataclasses.dataclass
class Strata(Step):
    """Writes the stratum of each document, numbered in the part; the part's record has their names."""

    by: str
    name = "strata"
    writes = False

    def load(self) -> None:
        """None is known."""
        self.known: dict[str, int] = {}

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Of a batch."""
        names = [str(document.record.get(self.by, "")) if self.by else "all" for document in documents]
        out.add("numbers", np.array([self.known.setdefault(name, len(self.known)) for name in names], np.int32))

    def finish(self, out: PartOutput) -> None:
        """The names."""
        out.record["strata"] = list(self.known)
        self.known = {}


@dataclasses.dataclass
class Chosen(Step):
    """The documents that are chosen. starts: the number of the first one of each part."""

    chosen: str
    starts: dict[int, int]
    name = "sample"

    def load(self) -> None:
        """Map the file."""
        self.is_chosen = np.memmap(self.chosen, bool, "r")

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Keep those of a batch."""
        start = self.starts[out.number] + out.position
        for document, wanted in zip(documents, self.is_chosen[start : start + len(documents)].tolist()):
            if wanted:
                out.keep(document)
