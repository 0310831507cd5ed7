"""One run of corpus work: inputs, lock, working folder, passes over the parts, output and report.

    files -> parts (readers.split_into_parts) -> workers (parts.PartRunner) -> a small file for each part -> output

As `data preprocess` does it: the split into parts depends on the input alone and parts are put together in order, so
the bytes of the output are the same for any engine, any number of workers, and a run that is resumed after a kill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from megalith.common.encodings import conversion_advice
from megalith.common.errors import ConfigError, DataError, problem
from megalith.common.extras import require
from megalith.common.files import atomic_path, remove_leftovers, sampled_digest, temporary_path
from megalith.common.locks import locked
from megalith.config.flags.text import Words
from megalith.curation.documents import MAX_DOCUMENT_BYTES
from megalith.curation.parts import OUTPUT, Step, StepJob, finished_parts, part_file
from megalith.curation.report import REPORTS, merged_rules, step_report, write_report
from megalith.curation.run_state import FINISHING, SAMPLES, begin_work, existing_report, fingerprint
from megalith.data.corpus.inputs import STANDARD_INPUT, Inputs, resolve_inputs, spooled
from megalith.data.corpus.preprocess_options import MAX_PART_BYTES, MIN_PART_BYTES
from megalith.data.corpus.preprocess_pool import ENGINES
from megalith.data.corpus.readers import Part, split_into_parts
from megalith.data.corpus.unusable import MAX_UNUSABLE, check_limit, require_usable

Notice = Callable[[str], None]


def quiet(line: str) -> None:
    """A notice that nobody sees."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What all verbs have: where documents come from and go to, and how the work is done."""

    input: Sequence[str]
    output: str
    json_key: str = ""  # "": that of the command, mostly "text"
    dropped: str = ""  # a file for the documents that are dropped
    workers: int = 0  # 0: one for each core
    partitions: int = 1
    engine: str = "processes"
    on_error: str = "skip"
    max_unusable: float = MAX_UNUSABLE  # an int counts documents, a float is a fraction of them
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    overwrite: bool = False
    owned: bool = False  # the output is a file between two steps: one of other settings is replaced


@dataclasses.dataclass(frozen=True)
class Command:
    """The settings of one verb, a dataclass whose fields are its flags; `run` does the work.

    text_key: where the text is, unless --json-key says. lines: a line of a text file is a document. beside: the ends of
    the names of files that it writes beside the output. drops: whether --dropped lists what it leaves out.
    """

    name = ""
    text_key = "text"
    lines = False
    beside: ClassVar[tuple[str, ...]] = ()
    drops = False

    def check(self) -> None:
        """Raise ConfigError for settings that cannot work."""

    def files(self, output: str) -> Iterable[str]:
        """Files whose content the result depends on, beside the input."""
        return ()

    def find_inputs(self, patterns: Sequence[str]) -> Inputs:
        """The files that --input names."""
        return resolve_inputs(patterns)

    def parts(self, run: Run, done: frozenset[int]) -> Iterator[Part]:
        """The parts of the input, those in `done` without content."""
        return split_into_parts(
            run.inputs.files,
            run.part_bytes,
            done,
            max_line=run.options.max_document_bytes,
            whole_texts=not self.lines,
        )

    def run(self, run: Run) -> dict[str, Any]:
        """Do the work, and write the output by `run.assemble`. Returns what the report says beside the counts."""
        raise NotImplementedError


@dataclasses.dataclass
class Pass:
    """What one pass over the parts gave: the records of the parts, in order."""

    job: StepJob
    records: list[dict]

    def file(self, record: Mapping, name: str) -> pathlib.Path | None:
        """A file of a part; None where the part has written none of that name."""
        return part_file(self.job, record["part"], name) if name in record["sums"] else None

    def array(self, record: Mapping, name: str, dtype: Any) -> np.ndarray:
        """The numbers that a part has written, mapped into memory."""
        path = self.file(record, name)
        return np.memmap(path, dtype, "r") if path is not None and path.stat().st_size else np.zeros(0, dtype)

    def arrays(self, name: str, dtype: Any) -> Iterator[np.ndarray]:
        """The numbers of each part, in order."""
        return (self.array(record, name, dtype) for record in self.records)

    def total(self, name: str) -> int:
        """The sum of a count over the parts."""
        return sum(record[name] for record in self.records)

    def starts(self, name: str, first: int = 0) -> dict[int, int]:
        """{part: number of its first item}, of items counted on from `first` over all parts.

        name: of a part's count, in its record or among what the step has counted itself.
        """
        counts = [int(record.get(name, record["values"].get(name, 0))) for record in self.records]
        before = itertools.accumulate(counts, initial=first)
        return {record["part"]: start for record, start in zip(self.records, before)}

    def values(self) -> dict[str, float]:
        """The sums of what the step has counted itself."""
        names = dict.fromkeys(name for record in self.records for name in record["values"])
        return {name: sum(record["values"].get(name, 0) for record in self.records) for name in names}


class Run:
    """A run in progress; made by `execute`."""

    def __init__(self, command: Command, options: RunOptions, notice: Notice, progress: Callable[[dict, int], None]):
        """Name the files; nothing is touched."""
        self.command, self.options, self.notice, self.progress = command, options, notice, progress
        self.output = options.output
        self.folder = pathlib.Path(f"{self.output}.parts")
        self.seconds: dict[str, float] = {}
        self.key, self.part_bytes, self.size = "", 1, 0
        self.inputs: Inputs = None  # type: ignore[assignment]  # known once `execute` has found them
        self.locks: list[Callable[[], None]] = []
        self.reading: Pass = None  # type: ignore[assignment]  # the first pass: what was read
        self._slices: dict[int, list[str]] = {}
        self._finishing = False

    def beside(self, end: str) -> str:
        """A file that lies beside the output: evidence, an index."""
        return f"{self.output}.{end}"

    def step_pass(self, step: Step, name: str, *, final: bool = False) -> Pass:
        """Run a step over all parts of the input. final: its documents are those of the output."""
        if self.reading is not None:  # parts of another split would be looked for among those of the first pass
            self._check_unchanged()
        job = self.step_job(step, name, final)
        done = finished_parts(self.made(job))
        if done:
            self.notice(f"resuming: {len(done)} parts are finished")
        parts = self.command.parts(self, frozenset(done))
        result = self.execute(job, self._noted(parts), done, name)
        if self.reading is None:
            self.reading = result
            self._check_usable(result)
        return result

    def still_held(self) -> None:
        """LockedError where a lock was lost while this process was suspended."""
        for check_lock in self.locks:
            check_lock()

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Count the time of the block as that of `name`."""
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def paths(self, part: int) -> list[str]:
        """The files that the slices of a part are of."""
        return self._slices[part]

    def execute(self, job: Any, parts: Iterable[Any], done: dict[int, dict], name: str) -> Pass:
        """The records of a job over parts, those of `done` as they are; other parts go to the engine."""
        started = time.monotonic()
        total = self.size or 1
        for record in done.values():
            self.progress(record, total)
        missing = (part for part in parts if part.number not in done)
        records = dict(done)
        for record in ENGINES.find(self.options.engine)(job, missing, self.options.workers):
            records[record["part"]] = record
            self.progress(record, total)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
        return Pass(job, [records[number] for number in sorted(records)])

    def step_job(self, step: Step, name: str, final: bool = False) -> StepJob:
        """What workers need for a step. name: of its folder. final: its documents are those of the output."""
        options, suffix = self.options, pathlib.Path(self.output).suffix
        return StepJob(
            step,
            str((self.folder / name).resolve()),
            self.key,
            options.json_key or self.command.text_key,
            options.max_document_bytes,
            suffix if final and suffix in (".gz", ".zst") else "",
            self.command.lines,
            bool(options.dropped) and final,
        )

    def made(self, job: StepJob) -> StepJob:
        """The job, with its folder made."""
        pathlib.Path(job.folder).mkdir(parents=True, exist_ok=True)
        return job

    def _noted(self, parts: Iterator[Part]) -> Iterator[Part]:
        for part in parts:
            self._slices[part.number] = [piece.path for piece in part.slices]
            yield part

    def assemble(self, done: Pass, name: str = OUTPUT, target: str = "") -> None:
        """Put a file of all parts together as the output, or as another file."""
        self.begin_finish()
        with atomic_path(target or self.output, self.still_held) as temporary, open(temporary, "wb") as out:
            for record in done.records:
                if (path := done.file(record, name)) is not None:
                    with open(path, "rb") as part:
                        shutil.copyfileobj(part, out, 1 << 20)

    def assemble_documents(self, done: Pass) -> None:
        """Put the documents that stay together as the output, and with --dropped those that do not as that file."""
        self.assemble(done)
        if self.options.dropped:
            self.assemble(done, "dropped", self.options.dropped)

    def begin_finish(self) -> None:
        """Mark that outputs are being put in place: after a kill, those that exist are this run's.

        Raises DataError where the input has changed meanwhile: nothing is in place yet.
        """
        self.still_held()
        if not self._finishing:
            self._check_unchanged()
            (self.folder / FINISHING).touch()
            self._finishing = True

    def _check_unchanged(self) -> None:
        if fingerprint(self) != self.key:
            what, rule = "The files of --input, and those that settings name", "must not change meanwhile"
            found = Words(f"a change, and --input {' '.join(map(str, self.options.input))}")
            raise DataError(problem(what, found, rule, "Give the same command again when nothing writes there"))

    def locator(self) -> Callable[[int, int, int], str]:
        """A function of part, slice and line in the slice that gives `file:line`."""
        before: dict[str, int] = {}
        starts: dict[tuple[int, int], tuple[str, int]] = {}
        for record in self.reading.records:
            for index, (path, lines) in enumerate(zip(self._slices[record["part"]], record["lines"])):
                starts[record["part"], index] = path, before.get(path, 0)
                before[path] = before.get(path, 0) + lines

        def locate(part: int, index: int, line: int) -> str:
            path, lines = starts[part, index]
            name = self.inputs.names.get(path, path)
            return f"{name}:{lines + line}" if self.command.lines else self.inputs.location(path, lines + line)

        return locate

    def rules(self, *passes: Pass) -> dict[str, dict]:
        """What the rules of passes did, with examples that name the file and line."""
        locate = self.locator()
        return {rule: found for each in passes for rule, found in merged_rules(each.records, locate).items()}

    def _check_usable(self, done: Pass) -> None:
        """Raise DataError where lines that are no documents are too many, or where --on-error fail forbids any."""
        locate, bad = self.locator(), done.total("num_problems")
        listed = [
            f"{locate(record['part'], index, line)}: {reason}"
            for record in done.records
            for index, line, reason in record["problems"]
        ]
        if bad and self.options.on_error == "fail":
            cure = f"{conversion_advice(listed)}Correct it, or use --on-error skip"
            raise DataError(f"{listed[0]}; --on-error fail stops at such a document. {cure}.")
        total = done.total("documents") + bad
        require_usable(bad, total, self.options.max_unusable, listed)
        if not done.total("documents"):
            rule, cure = "must hold documents", "Check the files and --json-key"
            raise DataError(problem("--input", Words("nothing"), rule, cure))
        for line in listed[:10]:
            self.notice(f"skipped {line}")
        if bad:
            self.notice(f"skipped {bad} lines of {total} that hold no document; the report lists some")
        self.problems = listed


def execute(
    command: Command,
    options: RunOptions,
    *,
    notice: Notice = quiet,
    progress: Callable[[dict, int], None] = lambda record, total: None,
) -> dict[str, Any]:
    """Do what `command` says; returns the report, which lies beside the output too.

    Raises DataError for unusable input and for outputs that exist, ConfigError for impossible settings, LockedError
    while another process writes the same. After a kill at any time, the same call resumes.
    """
    check_options(command, options)
    if options.output != STANDARD_INPUT:
        return _execute(command, options, notice, progress)
    with tempfile.TemporaryDirectory(prefix="megalith-") as folder:
        path = os.path.join(folder, "output.jsonl")
        report = _execute(command, dataclasses.replace(options, output=path), notice, progress)
        with open(path, "rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)
        sys.stdout.buffer.flush()
        return report


def check_options(command: Command, options: RunOptions) -> None:
    """Raise ConfigError for settings that cannot work."""
    if options.workers < 0 or options.partitions < 1 or options.max_document_bytes < 1:
        rule = "must be 0 (one for each core) or more, --partitions and --max-document-bytes 1 or more"
        found = Words(f"{options.workers}, {options.partitions} and {options.max_document_bytes}")
        raise ConfigError(problem("--workers", found, rule, "Correct them"))
    check_limit(options.max_unusable)
    if options.dropped and not command.drops:
        raise ConfigError(problem("--dropped", options.dropped, f"is not there for {command.name}", "Leave it out"))
    if options.output == STANDARD_INPUT and command.drops and command.beside:
        rule = f"must be a file for {command.name}, which lists beside it what it removes"
        raise ConfigError(problem("--output", options.output, rule, "Name a file"))
    if options.on_error not in ("skip", "fail"):
        raise ConfigError(problem("--on-error", options.on_error, "must be skip or fail", "Choose one"))
    ENGINES.find(options.engine)
    if options.engine == "ray":
        require("ray", "--engine ray")
    if options.output.endswith(".zst"):
        require("zstandard", options.output)
    command.check()


def _execute(command: Command, options: RunOptions, notice: Notice, progress: Callable) -> dict[str, Any]:
    started = time.monotonic()
    run = Run(command, options, notice, progress)
    outputs = [run.output, *([options.dropped] if options.dropped else [])]
    others = [run.beside(end) for end in (*command.beside, *REPORTS)]
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(locked(output, notice=notice)) for output in outputs]
        run.locks = held
        for file in (*outputs, *others):
            remove_leftovers(file, notice)
        found = command.find_inputs(options.input)
        spool = temporary_path(pathlib.Path(run.output))
        run.inputs = stack.enter_context(spooled(found, lambda: spool, notice))
        run.size = sum(os.path.getsize(path) for path in run.inputs.files)
        default = max(MIN_PART_BYTES, min(run.size // 4096, MAX_PART_BYTES))
        run.part_bytes = max(1, min(default, -(-run.size // options.partitions)))
        run.key = fingerprint(run)
        if report := existing_report(run, [*outputs, *others]):
            notice(f"{run.output}: already made from this input with these settings (--overwrite makes it again)")
            return report
        found.report_not_read(notice)
        begin_work(run)
        facts = command.run(run)
        report = step_report(run, facts, time.monotonic() - started)
        report |= {"key": run.key, "samples": {name: sampled_digest(name, SAMPLES) for name in outputs}}
        write_report(run.output, [report])
        shutil.rmtree(run.folder)
        return report
