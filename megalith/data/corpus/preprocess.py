"""A corpus of raw files to indexed datasets: split into parts, encode part by part, merge.

    files -> parts (readers.split_into_parts) -> workers (preprocess_part.PartEncoder)
          -> one small dataset for each part -> merge -> {prefix}_{key}_{level}

Tokens never pass between processes: a worker reads its bytes and writes its files, and the parent gets only counts. The
split into parts depends on the input alone, and parts are merged in order, so the bytes of the result are the same for
any engine, any number of workers, and a run that is resumed after a kill.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from megalith.common import units
from megalith.common.encodings import conversion_advice
from megalith.common.errors import DataError, problem
from megalith.config.flags.text import Words
from megalith.data.corpus.inputs import Inputs, is_stream, resolve_inputs, spooled
from megalith.data.corpus.preprocess_options import (
    PreprocessOptions,
    check_keys,
    check_options,
    fingerprint,
    input_sizes,
    option_notes,
    output_prefixes,
    require_special_tokens,
)
from megalith.data.corpus.preprocess_output import PreprocessOutput
from megalith.data.corpus.preprocess_part import COUNTS, STAGES, BadDocument, Job, finished_parts, part_prefix
from megalith.data.corpus.preprocess_pool import ENGINES
from megalith.data.corpus.readers import Part, read_part, sample_texts, split_into_parts
from megalith.data.corpus.unusable import require_usable
from megalith.data.indexed import best_dtype
from megalith.data.indexed.merge import merge_datasets
from megalith.data.tokenizers.tokenizer import Tokenizer, build_tokenizer

REPORTED_PROBLEMS = 1000


@dataclasses.dataclass
class PreprocessResult:
    """What was written: counts, the output prefix of each key, the report of problems, the seconds spent by stage."""

    prefixes: dict[str, str]
    documents: int
    sequences: int
    tokens: int
    bytes: int
    num_problems: int  # documents left out
    num_empty: int  # those of them that hold no text
    problems: list[str]
    report: str
    seconds: dict[str, float]
    elapsed: float
    resumed_parts: int
    encoder: str


def preprocess(
    options: PreprocessOptions,
    *,
    notice: Callable[[str], None] = lambda line: None,
    progress: Callable[[dict, int], None] = lambda record, total: None,
) -> PreprocessResult:
    """Write the datasets that `options` ask for.

    notice: called with lines for the user. progress: called with the record of each finished part and the bytes of all
    parts.
    Raises DataError for unusable input and for outputs that exist, ConfigError for impossible options, LockedError
    while another process writes the same. After a kill at any time, the same call resumes.
    """
    started = time.monotonic()
    check_options(options)
    output = PreprocessOutput(options.output_prefix, output_prefixes(options))
    with output.hold_locks(notice):
        found = resolve_inputs(options.input)
        check_keys(options, found)
        tokenizer = build_tokenizer(**dataclasses.asdict(options.tokenizer))
        require_special_tokens(options, tokenizer)
        with spooled(found, output.spool_folder, notice) as inputs:
            return _encode(options, output, inputs, tokenizer, notice, progress, started)


def _encode(
    options: PreprocessOptions,
    output: PreprocessOutput,
    inputs: Inputs,
    tokenizer: Tokenizer,
    notice: Callable[[str], None],
    progress: Callable[[dict, int], None],
    started: float,
) -> PreprocessResult:
    total, part_bytes = input_sizes(options, inputs.files)
    key = fingerprint(options, inputs, part_bytes, tokenizer.fingerprint())
    if result := output.existing_result(key, inputs.files, options.overwrite, options.on_error == "fail"):
        _require_usable(options, result)
        made = ", ".join(output.prefixes.values())
        notice(f"{made}: already made from this input with these settings; nothing to do (--overwrite makes it again)")
        output.remove_parts()
        return PreprocessResult(**result, report=output.report, elapsed=time.monotonic() - started)

    inputs.report_not_read(notice)
    for line in option_notes(options, inputs, tokenizer):
        notice(line)
    fast, encoder = False, "encoder: not accelerated, as asked"
    if options.fast:
        fast, encoder = tokenizer.accelerate(sample_texts(inputs.files, options.json_keys))
    for line in (*tokenizer.notes, encoder):
        notice(line)
    job = _build_job(options, str(output.working_folder(key, notice).resolve()), key, tokenizer, fast)
    records = finished_parts(job.folder, job.keys, key, without_problems=job.fail)
    resumed = len(records)
    if resumed:
        notice(f"resuming: {resumed} parts are finished")
    for record in records.values():
        progress(record, total)
    slices: dict[int, list[str]] = {}  # part -> path of each slice
    parts = (_note_slices(part, slices) for part in split_into_parts(inputs.files, part_bytes, frozenset(records)))
    unfinished = (part for part in parts if part.number not in records)
    try:
        for record in ENGINES.find(options.engine)(job, unfinished, options.workers):
            records[record["part"]] = record
            progress(record, total)
    except BadDocument as error:
        raise _bad_document_error(error, options, inputs, part_bytes) from error
    if fingerprint(options, inputs, part_bytes, tokenizer.fingerprint()) != key:
        what, rule = "The files of --input and of the tokenizer", "must not change during preprocessing"
        found = Words(f"a change, and --input {' '.join(map(str, options.input))}")
        raise DataError(problem(what, found, rule, "Give the same command again when nothing writes there"))
    ordered = [records[number] for number in sorted(slices)]
    merged = _finish(options, job, output, inputs, ordered, slices, encoder, resumed, started)
    output.remove_parts()
    return merged


def _build_job(options: PreprocessOptions, folder: str, key: str, tokenizer: Tokenizer, fast: bool) -> Job:
    """The settings that every worker gets. folder: of the parts. key: the fingerprint of the run."""
    return Job(
        folder=folder,
        key=key,
        tokenizer=dataclasses.asdict(options.tokenizer),
        keys=tuple(options.json_keys),
        fast=fast,
        split_sentences=options.split_sentences,
        language=options.lang,
        keep_newlines=options.keep_newlines,
        append_eod=options.append_eod,
        prepend_bos=options.prepend_bos,
        keep_empty=options.on_empty == "keep",
        fail=options.on_error == "fail",
        dtype=np.dtype(best_dtype(tokenizer.vocab_size)).name,
    )


def _note_slices(part: Part, slices: dict[int, list[str]]) -> Part:
    slices[part.number] = [piece.path for piece in part.slices]
    return part


def _require_usable(options: PreprocessOptions, totals: dict) -> None:
    """Raise DataError where more documents are unusable than --max-unusable allows; those without text do not count."""
    total = totals["documents"] + totals["num_problems"]
    examples = [line for line in totals["problems"] if ": empty document" not in line]
    require_usable(totals["num_problems"] - totals["num_empty"], total, options.max_unusable, examples)


def plan(options: PreprocessOptions) -> str:
    """What `preprocess` would do, in a few lines; raises what it would raise before the first document."""
    check_options(options)
    output = PreprocessOutput(options.output_prefix, output_prefixes(options))
    inputs = resolve_inputs(options.input)
    check_keys(options, inputs)
    tokenizer = build_tokenizer(**dataclasses.asdict(options.tokenizer))
    require_special_tokens(options, tokenizer)
    streams = [path for path in inputs.files if is_stream(path)]
    result = None
    if not streams:
        key = fingerprint(options, inputs, input_sizes(options, inputs.files)[1], tokenizer.fingerprint())
        result = output.existing_result(key, inputs.files, options.overwrite, options.on_error == "fail")
    dtype = np.dtype(best_dtype(tokenizer.vocab_size)).name
    size = units.size(sum(os.path.getsize(path) for path in inputs.files if path not in streams))
    unread = f", and what comes from {', '.join(streams)}" if streams else ""
    num_files = len(inputs.files) - len(streams)
    lines = [f"{num_files} files, {size}{unread}; {tokenizer.vocab_size} tokens in the vocabulary"]
    inputs.report_not_read(lines.append)
    would = "already made, nothing to do:" if result else "would write"
    lines += [f"{would} {prefix}.bin and .idx as {dtype}" for prefix in output.prefixes.values()]
    return "\n".join(lines)


def _bad_document_error(
    error: BadDocument,
    options: PreprocessOptions,
    inputs: Inputs,
    part_bytes: int,
) -> DataError:
    """The error that --on-error fail ends with, on the first unusable document."""
    where = _locate(error, inputs, options.json_keys, part_bytes)
    cure = f"{conversion_advice([error.reason])}Correct it, or use --on-error skip"
    if error.reason.startswith("empty"):
        cure += " or --on-empty keep"
    return DataError(f"{where}: {error.reason}; --on-error fail stops at the first such document. {cure}.")


def _locate(error: BadDocument, inputs: Inputs, keys: Sequence[str], part_bytes: int) -> str:
    """`file:line` of a document known by its slice; reads the slices before it in its file to count their lines."""
    before: dict[str, int] = {}
    for part in split_into_parts(inputs.files, part_bytes):
        for index, piece in enumerate(part.slices):
            if (part.number, index) == (error.part, error.index):
                return inputs.location(piece.path, before.get(piece.path, 0) + error.line)
            lines = max((batch.num_lines for _, batch in read_part(Part(0, (piece,), 0), keys)), default=0)
            before[piece.path] = before.get(piece.path, 0) + lines
    return f"part {error.part}"


def _finish(
    options: PreprocessOptions,
    job: Job,
    output: PreprocessOutput,
    inputs: Inputs,
    records: list[dict],
    slices: dict[int, list[str]],
    encoder: str,
    resumed: int,
    started: float,
) -> PreprocessResult:
    """Merge the parts and write the report."""
    merge_started = time.monotonic()
    totals: dict = {name: sum(record[name] for record in records) for name in COUNTS}
    totals["problems"] = problems = _list_problems(records, slices, inputs)
    if not totals["documents"]:
        found = Words(f"{totals['num_problems']} unusable ones" if totals["num_problems"] else "nothing")
        listed = "".join(f"\n  {line}" for line in problems[:5])
        cure = f"{conversion_advice(problems)}Check --json-keys and the files"
        raise DataError(problem("--input", found, "holds no usable document", cure) + listed)
    _require_usable(options, totals)
    output.begin_merge()
    for i, prefix in enumerate(output.prefixes.values()):
        parts = [part_prefix(job.folder, record["part"], i, job.key) for record in records]
        merge_datasets(parts, prefix, output.still_held)
    seconds = {stage: sum(record["seconds"][stage] for record in records) for stage in STAGES}
    seconds["joining"] = time.monotonic() - merge_started
    stored = {"prefixes": output.prefixes, **totals, "seconds": seconds, "resumed_parts": resumed, "encoder": encoder}
    report = {"tokenizer": job.tokenizer, "input": list(options.input), "not_read": inputs.not_read, "result": stored}
    output.finish(job.key, report)
    return PreprocessResult(**stored, report=output.report, elapsed=time.monotonic() - started)


def _list_problems(records: list[dict], slices: dict[int, list[str]], inputs: Inputs) -> list[str]:
    """`file:line: reason` of the problems in order, the first REPORTED_PROBLEMS of them."""
    lines_before: dict[str, int] = {}
    listed: list[str] = []
    for record in records:
        paths = slices[record["part"]]
        for index, path in enumerate(paths):
            for slice_index, line, reason in record["problems"]:
                if slice_index == index and len(listed) < REPORTED_PROBLEMS:
                    listed.append(f"{inputs.location(path, lines_before.get(path, 0) + line)}: {reason}")
            lines_before[path] = lines_before.get(path, 0) + record["lines"][index]
    return listed
