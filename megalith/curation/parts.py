"""A step over one part of the input: read, process, write, record. Workers of every engine run this.

A step is given documents in order, and says for each what becomes of it: kept (perhaps changed), or dropped by a rule.
Every drop and every change is counted by rule, with examples. What a part gives depends on the part alone, and parts
are put together in order, so the result is the same for any engine, any number of workers, and after a kill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import pathlib
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from megalith.common.extras import require
from megalith.common.files import write_text
from megalith.curation.documents import Document, DocumentBatch, dump, read_documents
from megalith.data.corpus.readers import Part

EXAMPLES = 3  # kept of each rule in a part, and in a report
LISTED_PROBLEMS = 200  # of a part; all are counted
EXCERPT = 300  # characters
OUTPUT = "output"  # name of the file of documents


class Step:
    """What is done with each document. A dataclass: its fields are its settings, and travel to the workers.

    name: in reports. writes: whether documents come out of it.
    """

    name = ""
    writes = True

    def load(self) -> None:
        """Load what all parts need; called once in each worker."""

    def read(self, part: Part, job: StepJob) -> Iterator[tuple[int, DocumentBatch]]:
        """The documents of a part in batches, each with the index of its slice."""
        return read_documents(part, job.text_key, job.max_document_bytes, job.lines)

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Say of each document what becomes of it, by the methods of `out`."""
        raise NotImplementedError

    def finish(self, out: PartOutput) -> None:
        """Called behind the last documents of a part."""


@dataclasses.dataclass(frozen=True)
class StepJob:
    """A step with all that a worker needs to run it on parts."""

    step: Step
    folder: str  # that parts are written to
    key: str  # digest of everything that the parts depend on
    text_key: str = "text"
    max_document_bytes: int = 64 << 20
    compression: str = ""  # of the output: "", ".gz" or ".zst"
    lines: bool = False  # a line of a text file is a document
    keep_dropped: bool = False  # dropped documents are written beside

    def worker(self) -> PartRunner:
        """What runs the step on a part, with all that it needs loaded."""
        return PartRunner(self)


class PartOutput:
    """What becomes of a part's documents. `position`: how many were read before the batch that is processed."""

    def __init__(self, job: StepJob, number: int, files: contextlib.ExitStack):
        """Nothing is written before the first document."""
        self.job, self.number, self.position = job, number, 0
        self.record: dict[str, Any] = {"kept": 0, "kept_bytes": 0, "rules": {}, "values": {}}
        self._files, self._open = files, dict[str, BinaryIO]()

    def keep(self, document: Document) -> None:
        """It is written."""
        line = document.line()
        self.record["kept"] += 1
        self.record["kept_bytes"] += len(line)
        if self.job.step.writes:
            self.write(OUTPUT, line)

    def drop(self, document: Document, rule: str, detail: str = "") -> None:
        """It is not written, because of a rule. detail: what was found, in a few words."""
        self.note(document, rule, detail, document.text)
        if self.job.keep_dropped:
            self.write("dropped", dump({"dropped_by": rule, "found": detail, **document.record}) + b"\n")

    def note(self, document: Document, rule: str, detail: str, text: str, after: str | None = None) -> None:
        """Count what a rule did, and keep the first few examples. after: what it changed the text to."""
        known = self.record["rules"].setdefault(
            rule, {"documents": 0, "changed": after is not None, "characters": 0, "examples": []}
        )
        known["documents"] += 1
        known["characters"] += len(text) if after is None else len(text) - len(after)
        if len(known["examples"]) < EXAMPLES:
            example = {"where": document.where, "found": detail}
            known["examples"].append(example | _excerpts(text, after))

    def count(self, name: str, value: float = 1) -> None:
        """Add to a number of the report."""
        values = self.record["values"]
        values[name] = values.get(name, 0) + value

    def write(self, name: str, content: bytes) -> None:
        """Append to a file of the part."""
        if name not in self._open:
            path = part_file(self.job, self.number, name)
            self._open[name] = self._files.enter_context(opened(path, self.job.compression if name == OUTPUT else ""))
        self._open[name].write(content)

    def add(self, name: str, values: np.ndarray) -> None:
        """Append numbers to a file of the part; their kind must be the same in all parts."""
        self.write(name, np.ascontiguousarray(values).tobytes())

    @property
    def names(self) -> list[str]:
        """Of the files that were written."""
        return list(self._open)


@contextlib.contextmanager
def opened(path: pathlib.Path, compression: str) -> Iterator[Any]:
    """A file to write bytes into, compressed by ".gz", ".zst" or not (""): equal bytes give equal files."""
    with open(path, "wb") as file:
        if compression == ".gz":
            with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
                yield packed
        elif compression == ".zst":
            compressor = require("zstandard", "--output in zstd").ZstdCompressor(level=3)
            with compressor.stream_writer(file, closefd=False) as packed:
                yield packed
        else:
            yield file


def _excerpts(before: str, after: str | None) -> dict[str, str]:
    """The beginning of a text; of a changed one, from shortly before the first change."""
    if after is None:
        return {"text": before[:EXCERPT]}
    same = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
    start = max(0, same - 60)
    return {"text": before[start : start + EXCERPT], "after": after[start : start + EXCERPT]}


class PartRunner:
    """Runs the step of a job on parts."""

    def __init__(self, job: StepJob):
        """Load what the step needs."""
        self.job = job
        job.step.load()

    def __call__(self, part: Part) -> dict:
        """Write the part's files, then its record; a part with a record is finished."""
        job, started = self.job, time.perf_counter()
        problems: list[tuple[int, int, str]] = []
        lines, read, size = [0] * len(part.slices), 0, 0
        num_problems = 0
        with contextlib.ExitStack() as files:
            out = PartOutput(job, part.number, files)
            for index, batch in job.step.read(part, job):
                job.step.process(batch.documents, out)
                out.position += len(batch.documents)
                lines[index], size = batch.num_lines, size + batch.size
                read += len(batch.documents)
                num_problems += len(batch.problems)
                room = LISTED_PROBLEMS - len(problems)
                problems += [(index, line, reason) for line, reason in batch.problems[:room]]
            job.step.finish(out)
        record = {"key": job.key, "part": part.number, "size": part.size, "bytes": size, "documents": read}
        record |= {"num_problems": num_problems, "problems": problems, "lines": lines}
        record |= out.record | {"seconds": time.perf_counter() - started}
        return write_record(job, part.number, record, out.names)


def part_file(job: StepJob, number: int, name: str) -> pathlib.Path:
    """A file of a part. Workers of a killed job may still write; their files have another key in their names."""
    return pathlib.Path(job.folder) / f"{number:06d}-{name}-{job.key[:12]}"


def write_record(job: StepJob, number: int, record: dict, names: Iterable[str]) -> dict:
    """Write the record that says that the part is finished, with checksums of its files; returns it."""
    record["sums"] = {name: checksum(part_file(job, number, name)) for name in names}
    write_text(part_file(job, number, "record.json"), json.dumps(record))
    return record


def checksum(path: pathlib.Path) -> int:
    """CRC-32 of a file: a power cut can keep a record and lose the data it describes."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def finished_parts(job: StepJob) -> dict[int, dict]:
    """Records of the parts that the job has written and whose files match the record."""
    records: dict[int, dict] = {}
    for path in sorted(pathlib.Path(job.folder).glob(f"[0-9]*-record.json-{job.key[:12]}")):
        try:
            record = json.loads(path.read_text())
            sums = record["sums"]
            good = record["key"] == job.key
            good = good and all(checksum(part_file(job, record["part"], name)) == sums[name] for name in sums)
        except (OSError, ValueError, KeyError, TypeError):
            good = False
        if good:
            records[record["part"]] = record
    return records
