"""`megalith data shuffle`: a global random order, out of core.

Each document gets a random key of its own, a function of the seed and of its place in the input. A first pass writes
the documents of a part by ranges of keys; a second one collects each range from all parts and sorts it. So memory holds
about one range, whatever the size of the corpus, and the order does not depend on the number of workers.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megalith.curation.documents import Document
from megalith.curation.parts import (
    OUTPUT,
    PartOutput,
    Step,
    StepJob,
    finished_parts,
    opened,
    part_file,
    write_record,
)
from megalith.curation.run import Command, Pass, Run
from megalith.curation.settings import ShuffleSettings
from megalith.curation.words import mix

RANGE_BYTES = 64 << 20  # of documents, about, that are sorted at once


def random_keys(seed: int, part: int, first: int, count: int) -> np.ndarray:
    """uint64 [count]: the keys of documents first, first + 1, ... of a part."""
    base = mix(np.array([seed, part], np.uint64) + np.array([1, 1 << 32], np.uint64))
    with np.errstate(over="ignore"):
        return mix(mix(base[:1] ^ base[1:]) + np.arange(first + 1, first + count + 1, dtype=np.uint64))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shuffle(ShuffleSettings, Command):
    """The step `megalith data shuffle`."""

    name = "shuffle"

    def run(self, run: Run) -> dict[str, Any]:
        """Scatter, then gather."""
        ranges = max(1, -(-run.size // RANGE_BYTES))
        scattered = run.step_pass(Scatter(self.seed, ranges), "scatter")
        job = GatherJob(run.step_job(Step(), "gather", final=True), scattered, ranges)
        done = finished_parts(run.made(job.output))
        gathered = run.execute(job, map(Range, range(ranges)), done, "gather")
        run.assemble(Pass(job.output, gathered.records))
        return {"kept_bytes": gathered.total("kept_bytes"), "kept": gathered.total("kept")}


@dataclasses.dataclass
class Scatter(Step):
    """Writes the documents of a part sorted by their keys, chunk by chunk, and how many each chunk has."""

    seed: int
    ranges: int
    name = "scatter"
    writes = False

    def load(self) -> None:
        """Nothing is collected yet."""
        self._reset()

    def _reset(self) -> None:
        self.lines: list[bytes] = []
        self.bytes = 0
        self.keys: list[np.ndarray] = [np.zeros(0, np.uint64)]

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Collect a batch; a compressed file is one part, which may be large."""
        lines = [document.line() for document in documents]
        self.lines += lines
        self.bytes += sum(map(len, lines))
        self.keys.append(random_keys(self.seed, out.number, out.position, len(documents)))
        if self.bytes >= RANGE_BYTES:
            self.finish(out)

    def finish(self, out: PartOutput) -> None:
        """Write a chunk."""
        keys = np.concatenate(self.keys)
        order = np.argsort(keys, kind="stable")
        lengths = np.fromiter(map(len, self.lines), np.int64, len(self.lines))[order]
        for number in order.tolist():
            out.write("documents", self.lines[number])
        out.add("keys", keys[order])
        out.add("lengths", lengths)
        out.add("chunks", np.array([len(lengths)]))
        self._reset()


def range_bounds(ranges: int) -> list[int]:
    """Where the ranges of keys begin, and the end of the last."""
    return [(number << 64) // ranges for number in range(ranges + 1)]


@dataclasses.dataclass(frozen=True)
class Range:
    """One range of keys, the unit of work of the second pass."""

    number: int


@dataclasses.dataclass(frozen=True)
class GatherJob:
    """Collects ranges. output: where they are written. scattered: the first pass."""

    output: StepJob
    scattered: Pass
    ranges: int

    def worker(self) -> Callable[[Range], dict]:
        """What collects one range."""
        return self._gather

    def _gather(self, part: Range) -> dict:
        started = time.perf_counter()
        bounds = range_bounds(self.ranges)
        low, high = bounds[part.number], bounds[part.number + 1]
        lines: list[bytes] = []
        found = [np.zeros(0, np.uint64)]
        for record in self.scattered.records:
            path = self.scattered.file(record, "documents")
            if path is not None:
                keys = self.scattered.array(record, "keys", np.uint64)
                starts = np.concatenate([[0], np.cumsum(self.scattered.array(record, "lengths", np.int64))])
                ends = np.cumsum(self.scattered.array(record, "chunks", np.int64)).tolist()
                for begin, end in zip([0, *ends], ends):
                    chunk = keys[begin:end]
                    first = begin + int(np.searchsorted(chunk, np.uint64(low)))
                    last = end if high >= 1 << 64 else begin + int(np.searchsorted(chunk, np.uint64(high)))
                    found.append(keys[first:last])
                    lines += _read(path, starts[first : last + 1])
        order = np.argsort(np.concatenate(found), kind="stable").tolist()
        record = {"key": self.output.key, "part": part.number, "size": 0, "bytes": 0, "documents": 0}
        record |= {"kept": len(lines), "kept_bytes": sum(map(len, lines)), "rules": {}, "values": {}}
        with opened(part_file(self.output, part.number, OUTPUT), self.output.compression) as out:
            for number in order:
                out.write(lines[number])
        record["seconds"] = time.perf_counter() - started
        return write_record(self.output, part.number, record, [OUTPUT])


def _read(path: pathlib.Path, starts: np.ndarray) -> list[bytes]:
    """The lines of a file that begin at these bytes, the last of which ends them."""
    with open(path, "rb") as file:
        file.seek(int(starts[0]))
        return [file.read(length) for length in np.diff(starts).tolist()]
