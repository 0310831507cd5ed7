"""`megalith data ids`: a number for each document, in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megalith.common.errors import DataError, problem
from megalith.curation.documents import Document
from megalith.curation.parts import PartOutput, Step
from megalith.curation.run import Command, Run
from megalith.curation.settings import IdsSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ids(IdsSettings, Command):
    """The step `megalith data ids`."""

    name = "ids"

    def run(self, run: Run) -> dict[str, Any]:
        """Count, then number."""
        counted = run.step_pass(Count(), "count")
        done = run.step_pass(Number(self, counted.starts("documents", self.first)), "number", final=True)
        run.assemble(done)
        return {"kept": done.total("kept"), "kept_bytes": done.total("kept_bytes")}


@dataclasses.dataclass
class Count(Step):
    """Reads documents; the records of parts say how many."""

    name = "count"
    writes = False

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Nothing but the count that every part has."""


@dataclasses.dataclass
class Number(Step):
    """Writes the ids. starts: the number of the first document of each part."""

    settings: Ids
    starts: dict[int, int]
    name = "ids"

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Number a batch."""
        settings = self.settings
        prefix = f"{settings.id_prefix}-" if settings.id_prefix else ""
        for number, document in enumerate(documents, self.starts[out.number] + out.position):
            if not settings.replace and settings.id_key in document.record:
                rule = (
                    f"must be a key that documents do not have yet; one has {document.record[settings.id_key]!r} there"
                )
                cure = "Give another key, or add --replace"
                raise DataError(problem("--id-key", settings.id_key, rule, cure))
            out.keep(document.replaced(**{settings.id_key: f"{prefix}{number:010d}"}))
