"""`megalith data decontaminate`: two passes: how often each n-gram of the tasks is there, then the cuts.

An n-gram that is in the corpus more than --max-frequency times is a phrase of the language, and stays. Around each
other one, --margin characters are removed on both sides, and what is left of a sentence there. The pieces between are
documents of their own (`split_id`); those that are too short are dropped, and documents that fall into too many pieces.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import ConfigError, problem
from megalith.curation.decontaminate.ngrams import Match, TaskNgrams, find_matches, task_ngrams
from megalith.curation.decontaminate.tasks import parse_task, read_task, task_files
from megalith.curation.documents import Document, groups_of
from megalith.curation.parts import PartOutput, Step
from megalith.curation.run import Command, Run
from megalith.curation.settings import DecontaminateSettings

SENTENCE_ENDS = frozenset(".!?。！？")
EXAMPLES = 5  # of each task in the report
CONTEXT = 80  # characters around an example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decontaminate(DecontaminateSettings, Command):
    """The step `megalith data decontaminate`."""

    name = "decontaminate"
    drops = True

    def check(self) -> None:
        """Raise ConfigError for tasks that are not there, and sizes that cannot be."""
        if not self.tasks:
            rule = "must name the files of at least one task"
            raise ConfigError(problem("--tasks", None, rule, "Write lambada=lambada_test.jsonl"))
        if self.min_ngram > self.max_ngram:
            rule = f"must be at most --max-ngram, {self.max_ngram}"
            raise ConfigError(problem("--min-ngram", self.min_ngram, rule, "Correct them"))
        for task in self.tasks:
            parse_task(task)

    def files(self, output: str) -> Iterable[str]:
        """Those of the tasks."""
        return [file for task in self.tasks for file in task_files(parse_task(task)[1])]

    def ngrams(self) -> TaskNgrams:
        """Of all tasks; several files of one name are one task."""
        texts: dict[str, list[str]] = {}
        for task in self.tasks:
            name, path, key = parse_task(task)
            texts.setdefault(name, []).extend(read_task(name, path, key))
        return task_ngrams(texts, self.max_ngram, self.min_ngram)

    def run(self, run: Run) -> dict[str, Any]:
        """Count, then cut."""
        ngrams = self.ngrams()
        counted = run.step_pass(CountNgrams(ngrams), "count")
        counts = np.zeros(ngrams.count, np.int64)
        for found in counted.arrays("matches", np.int32):
            counts += np.bincount(found, minlength=ngrams.count)
        wanted = (counts > 0) & ((counts <= self.max_frequency) | (self.max_frequency == 0))
        # Of what the corpus does not have, nothing needs to be searched for again.
        done = run.step_pass(Cut(self, ngrams.only(wanted)), "cut", final=True)
        run.assemble_documents(done)
        values = done.values()
        per_task = _per_task(ngrams, counts, wanted, values)
        lines = [f"{name}: {row['leaked']} of {row['ngrams']} n-grams leaked" for name, row in per_task.items()]
        common = int(((counts > 0) & ~wanted).sum())
        return {
            "kept": done.total("kept"),
            "kept_bytes": done.total("kept_bytes"),
            "rules": run.rules(done),
            "tasks": per_task,
            "common_ngrams": common,
            "lines": [*lines, f"{common} n-grams are there more than {self.max_frequency} times, and stay"],
        }


def _per_task(ngrams: TaskNgrams, counts, wanted, values: dict[str, float]) -> dict[str, dict]:
    owners = np.concatenate([np.zeros(0, np.int32), *(ngrams.owners[size] for size in sorted(ngrams.owners))])
    return {
        name: {
            "ngrams": int((owners == number).sum()),
            "leaked": int(((owners == number) & wanted).sum()),
            "occurrences": int(counts[(owners == number) & wanted].sum()),
            "documents": int(values.get(f"documents: {name}", 0)),
        }
        for number, name in enumerate(ngrams.names)
    }


@dataclasses.dataclass
class CountNgrams(Step):
    """Writes the number of each n-gram of the tasks that a document has."""

    ngrams: TaskNgrams
    name = "count"
    writes = False

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Search a batch."""
        for group in groups_of(documents):
            matches = find_matches([document.text for document in group], self.ngrams)
            if matches:
                out.add("matches", np.array([match.number for match in matches], np.int32))


@dataclasses.dataclass
class Cut(Step):
    """Documents without the n-grams that leaked."""

    settings: Decontaminate
    ngrams: TaskNgrams
    name = "decontaminate"

    def load(self) -> None:
        """The task of each n-gram, by number."""
        sizes = sorted(self.ngrams.owners)
        self.owners = np.concatenate([np.zeros(0, np.int32), *(self.ngrams.owners[size] for size in sizes)])

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Cut each document of a batch."""
        for group in groups_of(documents):
            matches: dict[int, list[Match]] = {}
            for match in find_matches([document.text for document in group], self.ngrams):
                matches.setdefault(match.text, []).append(match)
            for number, document in enumerate(group):
                if number in matches:
                    self._cut(document, matches[number], out)
                else:
                    out.keep(document)

    def _cut(self, document: Document, matches: list[Match], out: PartOutput) -> None:
        text, settings = document.text, self.settings
        tasks = dict.fromkeys(self.ngrams.names[self.owners[match.number]] for match in matches)
        for task in tasks:
            out.count(f"documents: {task}")
        pieces = split_around(text, [(match.start, match.end) for match in matches], settings.margin)
        pieces = [(start, end) for start, end in pieces if end - start >= max(1, settings.min_piece)]
        first = matches[0]
        found = f"{', '.join(tasks)}: {text[first.start : first.end]!r}"
        if not pieces:
            out.drop(document, "no_piece_left", found)
        elif len(pieces) > settings.max_pieces:
            out.drop(document, "too_many_pieces", f"{len(pieces)}; {found}")
        else:
            around = text[max(0, first.start - CONTEXT) : first.end + CONTEXT]
            out.note(document, "leak_removed", found, around, "")
            name = document.record.get("id", document.record.get("adlr_id"))
            for number, (start, end) in enumerate(pieces):
                split = {"split_id": f"{name}-{number}" if name is not None else number}
                out.keep(document.replaced(**{document.key: text[start:end]}, **split))


def split_around(text: str, spans: Sequence[tuple[int, int]], margin: int) -> list[tuple[int, int]]:
    """What stays of a text around some spans: (start, end) of each piece, without white space at its ends.

    Of each span, `margin` characters on both sides go too, and what is left of the sentences there: the piece before
    ends with a sentence, and the piece behind starts with one.
    """
    pieces, start = [], 0
    for begin, end in sorted(spans):
        left = max(start, begin - margin)
        while left > start and text[left - 1] not in SENTENCE_ENDS:
            left -= 1
        pieces.append((start, left))
        right = min(len(text), end + margin)
        while right < len(text) and text[right - 1] not in SENTENCE_ENDS:
            right += 1
        start = max(start, right)
    pieces.append((start, len(text)))
    return [piece for piece in (_stripped(text, *piece) for piece in pieces) if piece[0] < piece[1]]


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    inside = re.search(r"\S(?:.*\S)?", text[start:end], re.DOTALL)
    return (start + inside.start(), start + inside.end()) if inside else (start, start)
