"""`megalith data dedup`: two passes over the input, and between them the search for groups.

sign (workers)  -> digests, shingles, bands of each document
groups (here)   -> which document of each group stays, the evidence, what each source loses
filter (workers) -> the documents that stay
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import ConfigError, problem
from megalith.common.locks import locked
from megalith.curation.dedup.choose import NEAR, STAYS, Verdicts, choose
from megalith.curation.dedup.evidence import (
    EVIDENCE,
    RULES,
    clusters,
    over_budget,
    source_table,
    stop_over_budget,
    write_evidence,
)
from megalith.curation.dedup.index import MANIFEST, add_generation, generations
from megalith.curation.dedup.links import find_groups
from megalith.curation.dedup.occurrences import first_occurrences
from megalith.curation.dedup.origins import Names, sources
from megalith.curation.dedup.paragraphs import DropParagraphs, Removals, SignParagraphs
from megalith.curation.dedup.signatures import DIGEST, Sign
from megalith.curation.dedup.store import Piece, Store
from megalith.curation.documents import Document
from megalith.curation.parts import PartOutput, Step
from megalith.curation.run import Command, Pass, Run
from megalith.curation.settings import DedupSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dedup(DedupSettings, Command):
    """The step `megalith data dedup`."""

    name = "dedup"
    drops = True
    beside = (EVIDENCE,)

    def check(self) -> None:
        """Raise ConfigError that lists all mistakes."""
        problems = []
        if not 0 < self.threshold <= 1:
            problems.append(problem("--threshold", self.threshold, "must be above 0 and at most 1", "Correct it"))
        if (self.keep == "source") != bool(self.best_sources):
            rule = "must be given with --keep source, and with it alone"
            problems.append(problem("--best-sources", list(self.best_sources), rule, "Give both"))
        if self.index and self.by == "paragraph":
            problems.append(problem("--index", self.index, "holds documents, not paragraphs", "Leave it out"))
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def signature_settings(self) -> dict[str, Any]:
        """What signatures depend on: documents of an index must have been signed alike."""
        if self.by != "near":
            return {"by": self.by, "url_key": self.url_key if self.by == "url" else ""}
        names = ("by", "ngram_size", "ngram_unit", "bands", "rows", "seed")
        return {name: getattr(self, name) for name in names}

    def files(self, output: str) -> Iterable[str]:
        """The manifests of the index, as far as other outputs have written them."""
        earlier = generations(self.index, self.signature_settings, output) if self.index else []
        return [str(each.path / MANIFEST) for each in earlier]

    def run(self, run: Run) -> dict[str, Any]:
        """Sign, find groups, filter."""
        if self.by == "paragraph":
            return self._paragraphs(run)
        if not self.index:
            return self._documents(run)
        # One at a time: of two that run together neither would be compared with the other.
        with locked(self.index, inside=True, notice=run.notice) as still_held:
            run.locks.append(still_held)
            return self._documents(run)

    def _documents(self, run: Run) -> dict[str, Any]:
        earlier = generations(self.index, self.signature_settings, run.output) if self.index else []
        if self.index:
            run.notice(f"{self.index}: {len(earlier)} earlier runs are compared with")
        signed = run.step_pass(Sign(self), "sign")
        near = self.by == "near"
        pieces = [_piece(signed, record, self.bands if near else 0) for record in signed.records]
        store = Store([*(each.piece() for each in earlier), *pieces])
        indexed = len(store) - signed.total("documents")
        with run.clock("groups"):
            groups = find_groups(store, self.bands if near else 0, self.threshold, self.jaccard)
            names, source = sources(run, signed, self.source_key)
            verdicts = self._choose(store, groups, indexed, names, source)
            removed = verdicts.verdict[indexed:] != STAYS
        name = Names(run, signed, [each.names() for each in earlier])
        with run.clock("evidence"):
            write_evidence(self._evidence(run), groups, verdicts, indexed, name, names, source)
        total, lost = (np.bincount(each, minlength=len(names)) for each in (source, source[removed]))
        facts = self._check_budget(run, source_table(names, total, lost, "documents"), "documents")
        done = self._filter(run, verdicts, indexed, signed)
        run.assemble_documents(done)
        if self.index:
            _add_to_index(self, run, pieces, ~removed, name, indexed)
        facts |= {"clusters": clusters(groups, verdicts, name)}
        facts |= {"compared": groups.compared, "not_compared": groups.unfinished}
        if near:
            below = (verdicts.verdict == NEAR) & (verdicts.similarity < self.threshold)
            facts["below_threshold_to_kept"] = int(below.sum())  # linked through others; --direct keeps them
        return self._finished(run, done) | facts

    def _evidence(self, run: Run) -> str:
        """Where evidence is written; it is put beside the output once that is in place."""
        return str(run.folder / EVIDENCE)

    def _check_budget(self, run: Run, table: dict[str, dict[str, float]], what: str) -> dict[str, Any]:
        """What the report says of sources. Raises DataError where one loses too much, unless that is to be warned of.

        what: the unit of the table.
        """
        lines = over_budget(table, self.source_budget, self.budget_documents, what)
        if self.over_budget == "stop":
            stop_over_budget(lines, self.source_budget, what, self._evidence(run))
        for line in lines:
            run.notice(f"--source-budget: {line}")
        shown = f"evidence of each removal: {run.beside(EVIDENCE)}"
        facts = {"lines": [shown, *lines], "evidence": run.beside(EVIDENCE), "over_budget": lines}
        return facts | {"sources": dict(list(table.items())[:1000])}

    def _finished(self, run: Run, done: Pass) -> dict[str, Any]:
        """Put the evidence in place; the counts of a filter."""
        os.replace(self._evidence(run), run.beside(EVIDENCE))
        return {"kept": done.total("kept"), "kept_bytes": done.total("kept_bytes"), "rules": run.rules(done)}

    def _choose(self, store, groups, indexed, names, source) -> Verdicts:
        places = {name: place for place, name in enumerate(self.best_sources)}
        preference = np.array([places.get(name, len(places)) for name in names], np.int64)
        of_documents = np.concatenate([np.zeros(indexed, np.int64), preference[source] if len(source) else source])
        return choose(
            store,
            groups,
            indexed,
            self.keep,
            of_documents,
            kind=self.jaccard,
            threshold=self.threshold,
            direct=self.direct,
        )

    def _filter(self, run: Run, verdicts: Verdicts, indexed: int, signed: Pass) -> Pass:
        paths = {}
        for name in ("verdict", "similarity"):
            paths[name] = str((run.folder / f"{name}.bin").resolve())
            getattr(verdicts, name)[indexed:].tofile(paths[name])
        starts = signed.starts("documents")
        return run.step_pass(Filter(paths["verdict"], paths["similarity"], starts), "filter", final=True)

    def _paragraphs(self, run: Run) -> dict[str, Any]:
        """Sign paragraphs, find those that are there for the first time, take out the others."""
        signed = run.step_pass(SignParagraphs(self.min_paragraph_words, self.source_key, self.id_key), "sign")
        count = int(signed.values().get("paragraphs", 0))
        with run.clock("groups"):
            path = (run.folder / "first.bin").resolve()
            first = first_occurrences(lambda: signed.arrays("paragraphs", np.uint64), count, path)
        names, source = sources(run, signed, self.source_key)
        removals = Removals(signed, first)
        with run.clock("evidence"):
            removals.write(self._evidence(run), Names(run, signed), names, source)
        total, lost = removals.by_source(source, len(names))
        facts = self._check_budget(run, source_table(names, total, lost, "paragraphs"), "paragraphs")
        done = run.step_pass(DropParagraphs(str(path), signed.starts("paragraphs")), "filter", final=True)
        run.assemble_documents(done)
        return self._finished(run, done) | facts | {"values": signed.values() | done.values()}


@dataclasses.dataclass
class Filter(Step):
    """The documents whose verdict is that they stay. starts: number of the first document of each part."""

    verdict: str
    similarity: str
    starts: dict[int, int]
    name = "filter"

    def load(self) -> None:
        """Map the files."""
        self.verdicts = np.memmap(self.verdict, np.uint8, "r")
        self.similarities = np.memmap(self.similarity, np.float32, "r")

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Keep, or drop with the similarity to the one that stays."""
        start = self.starts[out.number] + out.position
        verdicts = self.verdicts[start : start + len(documents)].tolist()
        for number, (document, verdict) in enumerate(zip(documents, verdicts), start):
            if verdict == STAYS:
                out.keep(document)
            else:
                out.drop(document, RULES[verdict], f"similarity {self.similarities[number]:.3f}")


def _piece(signed: Pass, record: dict, bands: int) -> Piece:
    shaped = signed.array(record, "bands", np.uint64)
    return Piece(
        signed.array(record, "digests", DIGEST),
        signed.array(record, "lengths", np.int32),
        signed.array(record, "shingles", np.uint32),
        signed.array(record, "counts", np.int32),
        shaped.reshape(bands, -1) if bands and len(shaped) else np.zeros((bands, 0), np.uint64),
    )


def _add_to_index(settings, run: Run, pieces: Sequence[Piece], stays, name: Names, indexed: int) -> None:
    ends = np.cumsum([0, *(len(piece.digests) for piece in pieces)])
    parts: Iterable[tuple[Piece, np.ndarray]] = (
        (piece, stays[start:end]) for piece, start, end in zip(pieces, ends, ends[1:])
    )
    names: Iterator[str] = (name(indexed + i) for i in np.flatnonzero(stays).tolist())
    add_generation(settings.index, settings.signature_settings, run.output, parts, names, run.still_held)
