"""`megalith data wiki`: MediaWiki dumps, and what WikiExtractor made of one, to lines of id, url, title and text."""

from __future__ import annotations

import dataclasses
import glob
import html
import os
from collections.abc import Iterator, Sequence
from typing import Any

from megalith.common.errors import DataError, problem
from megalith.common.extras import require
from megalith.config.flags.text import Words
from megalith.curation.documents import Document, DocumentBatch, read_documents
from megalith.curation.parts import PartOutput, Step, StepJob
from megalith.curation.run import Command, Run
from megalith.curation.settings import WikiSettings
from megalith.curation.wiki.dump import Damage, Page, Site, read_pages, read_site
from megalith.curation.wiki.wikitext import Choices, dropped_namespaces, to_text
from megalith.data.corpus.compression import compression, first_bytes
from megalith.data.corpus.inputs import Inputs, resolve_inputs
from megalith.data.corpus.readers import Part, Slice, split_into_parts

PART_BYTES = 4 << 20  # of a compressed dump: some 20 MB of text, half a minute
BATCH_PAGES = 64


def is_dump(path: str) -> bool:
    """Whether a file is a dump by its name; others are lines of JSON."""
    return ".xml" in os.path.basename(path).lower()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wiki(WikiSettings, Command):
    """The step `megalith data wiki`."""

    name = "wiki"

    def check(self) -> None:
        """Raise MissingPackage without the parser."""
        require("mwparserfromhell", "data wiki")

    def find_inputs(self, patterns: Sequence[str]) -> Inputs:
        """Dumps by their names, and other files as all steps read them."""
        names = [name for pattern in patterns for name in (sorted(glob.glob(pattern)) or [pattern])]
        dumps = [name for name in names if is_dump(name) and os.path.isfile(name)]
        for name in dumps:
            kind = compression(first_bytes(name))
            if kind not in ("", ".bz2"):
                rule = "must be XML, or XML in bzip2, whose blocks can be read side by side"
                raise DataError(problem("--input", Words(f"{name}, in {kind[1:]}"), rule, f"Decompress {name}"))
        others = [name for name in names if name not in dumps]
        found = resolve_inputs(others) if others else Inputs([], [])
        return dataclasses.replace(found, files=list(dict.fromkeys([*dumps, *found.files])))

    def parts(self, run: Run, done: frozenset[int]) -> Iterator[Part]:
        """Ranges of bytes of dumps, then the parts of other files."""
        number = 0
        size = min(run.part_bytes, PART_BYTES)
        for path in filter(is_dump, run.inputs.files):
            total = os.path.getsize(path)
            for start in range(0, total, size):
                stop = min(start + size, total)
                yield Part(number, (Slice(path, start, stop),), stop - start)
                number += 1
        others = [path for path in run.inputs.files if not is_dump(path)]
        shifted = frozenset(each - number for each in done)
        for part in split_into_parts(others, run.part_bytes, shifted, max_line=run.options.max_document_bytes):
            yield dataclasses.replace(part, number=part.number + number)

    def run(self, run: Run) -> dict[str, Any]:
        """One pass; what the heads of dumps say is read before."""
        sites = {path: read_site(path) for path in run.inputs.files if is_dump(path)}
        done = run.step_pass(WikiStep(self, sites), "wiki", final=True)
        run.assemble(done)
        return {"rules": run.rules(done), "values": done.values()}


@dataclasses.dataclass
class WikiStep(Step):
    """Pages to documents. sites: of each dump."""

    settings: Wiki
    sites: dict[str, Site]
    name = "wiki"

    def load(self) -> None:
        """What links are dropped depends on the dump's language."""
        settings = self.settings
        self.choices = {
            path: Choices(
                settings.headings,
                settings.lists,
                settings.tables,
                settings.formulas,
                dropped_namespaces(site.namespaces),
            )
            for path, site in self.sites.items()
        }
        self.wanted = frozenset(map(int, settings.namespaces))

    def read(self, part: Part, job: StepJob) -> Iterator[tuple[int, DocumentBatch]]:
        """Pages of a dump as documents with their wikitext; "line" is the number of the page in the part."""
        piece = part.slices[0]
        if not is_dump(piece.path):
            yield from read_documents(part, job.text_key, job.max_document_bytes)
            return
        batch = DocumentBatch([], [], 0, 0)
        for number, page in enumerate(read_pages(piece.path, piece.start, piece.stop or 0, job.max_document_bytes), 1):
            batch.num_lines = number
            if isinstance(page, Damage):
                batch.problems.append((number, page.reason))
            else:
                batch.documents.append(self._document(page, piece.path, number, job.text_key))
                batch.size += len(page.wikitext)
            if len(batch.documents) >= BATCH_PAGES:
                yield 0, batch
                batch = DocumentBatch([], [], number, 0)
        yield 0, batch

    def _document(self, page: Page, path: str, number: int, key: str) -> Document:
        record = {"id": page.id, "url": self.sites[path].url(page.id), "title": page.title, key: page.wikitext}
        return Document(record | {"page": page, "path": path}, key, (0, number))

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Wikitext to text; redirects, other namespaces and pages without text are dropped."""
        for document in documents:
            page = document.record.pop("page", None)
            if page is None:
                _extracted(document, out)
                continue
            choices = self.choices[document.record.pop("path")]
            if page.redirect or page.wikitext.lstrip()[:9].upper() == "#REDIRECT":
                out.drop(document, "redirect", page.redirect)
            elif page.namespace not in self.wanted:
                out.drop(document, "namespace", str(page.namespace))
            else:
                self._convert(document, choices, out)

    def _convert(self, document: Document, choices: Choices, out: PartOutput) -> None:
        try:
            text = to_text(document.text, choices)
        except RecursionError:
            out.drop(document, "nested_too_deeply")
            return
        if text.strip():
            out.keep(document.with_text(text))
        else:
            out.drop(document, "no_text")


def _extracted(document: Document, out: PartOutput) -> None:
    """A line of WikiExtractor: its entities are resolved; pages of which it left nothing are dropped."""
    names = ("id", "url", "title")
    text = html.unescape(document.text).strip()
    if not text:
        out.drop(document, "no_text")
        return
    record = {name: document.record[name] for name in names if name in document.record}
    out.keep(Document(record | {document.key: text}, document.key, document.where))
