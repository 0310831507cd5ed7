"""`megalith data warc`: web archives to lines of url, date and text."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from megalith.common.errors import DataError, problem
from megalith.common.extras import require
from megalith.config.flags.text import Words
from megalith.curation.documents import Document, DocumentBatch
from megalith.curation.parts import PartOutput, Step, StepJob
from megalith.curation.run import Command, Run
from megalith.curation.settings import WarcSettings
from megalith.curation.warc.pages import PLAIN, Page, read_page
from megalith.curation.warc.records import RECORD, Damage, read_records
from megalith.data.corpus.compression import compression, first_bytes, open_decompressed
from megalith.data.corpus.inputs import Inputs, is_stream, resolve_inputs
from megalith.data.corpus.readers import Part, Slice

BATCH_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warc(WarcSettings, Command):
    """The step `megalith data warc`."""

    name = "warc"
    drops = True

    def check(self) -> None:
        """Raise MissingPackage without what reads pages."""
        for package in ("trafilatura", "urllib3"):
            require(package, "data warc")

    def find_inputs(self, patterns: Sequence[str]) -> Inputs:
        """As all steps find them. Raises DataError for a file of another kind."""
        found = resolve_inputs(patterns)
        for path in found.files:
            if not is_stream(path) and not _holds_records(path):
                rule, cure = "must be WARC, plain or in gzip", "Name files of a web archive: crawl/*.warc.gz"
                raise DataError(problem("--input", Words(path), rule, cure))
        return found

    def parts(self, run: Run, done: frozenset[int]) -> Iterator[Part]:
        """Ranges of bytes of files in gzip, and other files as a whole."""
        number = 0
        for path in run.inputs.files:
            total = os.path.getsize(path)
            size = run.part_bytes if compression(first_bytes(path)) == ".gz" else total
            for start in range(0, total, size):
                stop = min(start + size, total)
                yield Part(number, (Slice(path, start, stop),), stop - start)
                number += 1

    def run(self, run: Run) -> dict[str, Any]:
        """One pass."""
        done = run.step_pass(WarcStep(self), "warc", final=True)
        run.assemble_documents(done)
        return {"rules": run.rules(done)}


def _holds_records(path: str) -> bool:
    if compression(first_bytes(path)) not in ("", ".gz"):
        return False
    with open_decompressed(path) as stream:
        return stream.read(len(RECORD)) == RECORD


@dataclasses.dataclass
class WarcStep(Step):
    """Records to documents."""

    settings: Warc
    name = "warc"

    def load(self) -> None:
        """Import what extracts texts."""
        self.extract = require("trafilatura", "data warc").extract

    def read(self, part: Part, job: StepJob) -> Iterator[tuple[int, DocumentBatch]]:
        """Pages as documents with their HTML; "line" is the number of the page in the part."""
        piece, batch, number = part.slices[0], DocumentBatch([], [], 0, 0), 0
        for record in read_records(piece.path, piece.start, piece.stop or 0, job.max_document_bytes):
            try:
                if isinstance(record, Damage):
                    raise ValueError(record.reason)
                page = read_page(record, job.max_document_bytes)
                if page is None:
                    continue
                fields = {"url": page.url, "date": page.date, job.text_key: page.text, "page": page}
                batch.documents.append(Document(fields, job.text_key, (0, number + 1)))
                batch.size += len(record.content)
            except ValueError as error:
                batch.problems.append((number + 1, f"at byte {record.at:,}: {error}"))
            number += 1
            batch.num_lines = number
            if batch.size >= BATCH_BYTES:
                yield 0, batch
                batch = DocumentBatch([], [], number, 0)
        yield 0, batch

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """HTML to text; answers of other kinds and pages without text are dropped."""
        for document in documents:
            page = document.record.pop("page")
            if page.status != 200:
                out.drop(document, "status", str(page.status))
            elif not (page.is_html or page.media_type in PLAIN):
                out.drop(document, "media_type", page.media_type)
            else:
                self._convert(document, page, out)

    def _convert(self, document: Document, page: Page, out: PartOutput) -> None:
        text: str | None = page.text
        if page.is_html and not self.settings.html:
            try:
                text = self.extract(page.text, include_comments=False)
            except Exception as error:  # a parser of other people's, on pages of anybody's
                out.drop(document, "unreadable", type(error).__name__)
                return
        if text and text.strip():
            out.keep(document.with_text(text))
        else:
            out.drop(document, "no_text")
