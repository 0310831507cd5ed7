"""A corpus of raw files to indexed datasets: plan, encode part by part, join; resumes after a kill, same bytes for any engine.

    files -> parts (readers.cut) -> workers (preprocess_part.PartEncoder) -> one small dataset a part -> merge -> {prefix}_{key}_{level}

Tokens never pass between processes: a worker reads its bytes and writes its files, the parent hears only counts. The cut into parts
is a function of the input alone, and parts are joined in order, so the result does not depend on who did what when.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from megalith.common import units
from megalith.common.encodings import conversion
from megalith.common.errors import ConfigError, DataError, problem
from megalith.common.extras import lacking
from megalith.data.corpus.inputs import Inputs, file_format, is_stream, look_for, spooled
from megalith.data.corpus.preprocess_output import Output
from megalith.data.corpus.preprocess_part import STAGES, BadDocument, Job, finished_parts, part_prefix
from megalith.data.corpus.preprocess_pool import ENGINES
from megalith.data.corpus.readers import Part, cut, read_part, sample_texts
from megalith.data.corpus.sentences import language_code
from megalith.data.corpus.unusable import MAX_UNUSABLE, check_limit, require_usable
from megalith.data.indexed import best_dtype
from megalith.data.indexed.merge import merge_datasets
from megalith.data.tokenizers.tokenizer import Tokenizer, TokenizerOptions, build_tokenizer

SMALLEST_PART, LARGEST_PART = 4 << 20, 64 << 20  # bytes of input; --partitions can ask for smaller ones
FORMAT = 2  # raise when the meaning of stored parts changes
REPORTED_PROBLEMS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What `megalith data preprocess` is asked for; the names are its flags."""

    input: Sequence[str]
    output_prefix: str
    tokenizer: TokenizerOptions
    json_keys: Sequence[str] = ("text",)
    split_sentences: bool = False
    lang: str = "english"
    keep_newlines: bool = False
    append_eod: bool = False
    prepend_bos: bool = False
    workers: int = 0  # 0: one for each core
    partitions: int = 1
    on_error: str = "skip"
    on_empty: str = "skip"
    max_unusable: float = MAX_UNUSABLE  # an int counts documents, a float is a share of them
    engine: str = "processes"
    fast: bool = True
    overwrite: bool = False


@dataclasses.dataclass
class PreprocessResult:
    """What was made: counts, output prefix by key, the problems' report, and the seconds that workers spent in each stage."""

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
    """Make the datasets that `options` ask for.

    notice: called with lines worth telling. progress: called with the record of each finished part and the bytes of all parts.
    Raises DataError for unusable input and for outputs that exist, ConfigError for impossible options, LockedError while another
    process writes the same. Killed at any time, the same call goes on.
    """
    started = time.monotonic()
    _validate(options)
    output = Output(options.output_prefix, output_prefixes(options))
    with output.held(notice):
        return _preprocess(options, output, notice, progress, started)


def _preprocess(
    options: PreprocessOptions,
    output: Output,
    notice: Callable[[str], None],
    progress: Callable[[dict, int], None],
    started: float,
) -> PreprocessResult:
    found = look_for(options.input)
    _check_keys(options, found)
    tokenizer = build_tokenizer(**dataclasses.asdict(options.tokenizer))
    _require_tokens(options, tokenizer)
    with spooled(found, output.spool, notice) as inputs:
        return _encode(options, output, inputs, tokenizer, notice, progress, started)


def _encode(
    options: PreprocessOptions,
    output: Output,
    inputs: Inputs,
    tokenizer: Tokenizer,
    notice: Callable[[str], None],
    progress: Callable[[dict, int], None],
    started: float,
) -> PreprocessResult:
    total, part_bytes = _sizes(options, inputs.files)
    key = _fingerprint(options, inputs, part_bytes, tokenizer.fingerprint())
    if done := output.done(key, inputs.files, options.overwrite, options.on_error == "fail"):
        _require_usable(options, done)
        made = ", ".join(output.prefixes.values())
        notice(f"{made}: already made from this input with these settings; nothing to do (--overwrite makes it again)")
        output.remove_parts()
        return PreprocessResult(**done, report=output.report, elapsed=time.monotonic() - started)

    inputs.tell(notice)
    for line in (*_idle(options), *_twice(options, tokenizer), *_plain(inputs)):
        notice(line)
    fast, encoder = False, "encoder: plain, as asked"
    if options.fast:
        fast, encoder = tokenizer.accelerate(sample_texts(inputs.files, options.json_keys))
    for line in (*tokenizer.notes, encoder):
        notice(line)
    job = Job(
        folder=str(output.working_folder(key, notice).resolve()),
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
    records = finished_parts(job.folder, job.keys, key, whole=job.fail)
    resumed = len(records)
    if resumed:
        notice(f"resuming: {resumed} parts are finished")
    for record in records.values():
        progress(record, total)
    slices: dict[int, list[str]] = {}  # part -> path of each slice
    parts = (_noted(part, slices) for part in cut(inputs.files, part_bytes, frozenset(records)))
    todo = (part for part in parts if part.number not in records)
    try:
        for record in ENGINES.find(options.engine)(job, todo, options.workers):
            records[record["part"]] = record
            progress(record, total)
    except BadDocument as error:
        where = _place(error, inputs, options.json_keys, part_bytes)
        otherwise = "Correct it, or use --on-error skip" + (
            " or --on-empty keep" if error.reason.startswith("empty") else ""
        )
        cure = conversion([error.reason]) + otherwise
        raise DataError(
            f"{where}: {error.reason}; --on-error fail stops at the first such document. {cure}."
        ) from error
    if _fingerprint(options, inputs, part_bytes, tokenizer.fingerprint()) != key:
        rule = "a file of it, or of the tokenizer, changed while it was read, and the parts are of before and after"
        raise DataError(
            problem("--input", list(options.input), rule, "Give the same command again when nothing writes there")
        )
    ordered = [records[number] for number in sorted(slices)]
    result = _finish(options, job, output, inputs, ordered, slices, encoder, resumed, started)
    output.remove_parts()
    return result


def _sizes(options: PreprocessOptions, inputs: list[str]) -> tuple[int, int]:
    """Bytes of all inputs, and of a part."""
    total = sum(os.path.getsize(path) for path in inputs)
    return total, max(1, min(max(SMALLEST_PART, min(total // 4096, LARGEST_PART)), -(-total // options.partitions)))


def _plain(inputs: Inputs) -> list[str]:
    """A line about plain text: it has no marks of where a document ends."""
    texts = [path for path in inputs.files if file_format(path)[0] == "text"]
    if not texts:
        return []
    one = f"{inputs.shown(texts[0], 1)} is plain text and becomes one document"
    what = one if len(texts) == 1 else f"{len(texts)} files are plain text and become one document each"
    return [f"{what}, which --split cannot divide; JSON lines hold a document a line"]


def _check_keys(options: PreprocessOptions, inputs: Inputs) -> None:
    texts = [path for path in inputs.files if not is_stream(path) and file_format(path)[0] == "text"]
    if len(options.json_keys) > 1 and texts:
        rule = f"a plain text file ({texts[0]}) has one text and no keys"
        raise ConfigError(problem("--json-keys", list(options.json_keys), rule, "Give one key"))


def _require_usable(options: PreprocessOptions, totals: dict) -> None:
    """DataError where more documents are unusable than --max-unusable allows; those without text are not meant by it."""
    total = totals["documents"] + totals["num_problems"]
    listed = [line for line in totals["problems"] if ": empty document" not in line]
    require_usable(totals["num_problems"] - totals["num_empty"], total, options.max_unusable, listed)


def _require_tokens(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    for name in ["eod"] * options.append_eod + ["bos"] * options.prepend_bos:
        tokenizer.require(name)


def plan(options: PreprocessOptions) -> str:
    """What `preprocess` would do, in a few lines; raises what it would raise before the first document."""
    _validate(options)
    output = Output(options.output_prefix, output_prefixes(options))
    inputs = look_for(options.input)
    _check_keys(options, inputs)
    tokenizer = build_tokenizer(**dataclasses.asdict(options.tokenizer))
    _require_tokens(options, tokenizer)
    streams = [path for path in inputs.files if is_stream(path)]
    made = None
    if not streams:
        key = _fingerprint(options, inputs, _sizes(options, inputs.files)[1], tokenizer.fingerprint())
        made = output.done(key, inputs.files, options.overwrite, options.on_error == "fail")
    dtype = np.dtype(best_dtype(tokenizer.vocab_size)).name
    size = units.size(sum(os.path.getsize(path) for path in inputs.files if path not in streams))
    unread = f", and what comes from {', '.join(streams)}" if streams else ""
    lines = [
        f"{len(inputs.files) - len(streams)} files, {size}{unread}; {tokenizer.vocab_size} tokens in the vocabulary"
    ]
    inputs.tell(lines.append)
    would = "already made, nothing to do:" if made else "would write"
    lines += [f"{would} {prefix}.bin and .idx as {dtype}" for prefix in output.prefixes.values()]
    return "\n".join(lines)


def output_prefixes(options: PreprocessOptions) -> dict[str, str]:
    """The prefix of each key's dataset."""
    level = "sentence" if options.split_sentences else "document"
    return {key: f"{options.output_prefix}_{key}_{level}" for key in options.json_keys}


def _idle(options: PreprocessOptions) -> list[str]:
    """Lines on options that do not do all that their names say."""
    lines = []
    if not options.split_sentences:
        used = [
            flag
            for flag, given in (("--lang", options.lang != "english"), ("--keep-newlines", options.keep_newlines))
            if given
        ]
        lines += [f"{flag} has no effect without --split-sentences: documents are not cut" for flag in used]
    elif len(code := language_code(options.lang)) == 3:
        lines.append(
            f"--lang {code}: sentences are cut by its rules or its nearest language's; where none are known, by those of English"
        )
    return lines


def _twice(options: PreprocessOptions, tokenizer: Tokenizer) -> list[str]:
    """Lines on tokens that the tokenizer puts round every text, and an option once more, as it does in Megatron."""
    lines = []
    for flag, name, at, where in (("--append-eod", "eod", -1, "after"), ("--prepend-bos", "bos", 0, "before")):
        token, given = getattr(tokenizer, name), getattr(options, flag[2:].replace("-", "_"))
        if given and all(ids and ids[at] == token for ids in map(tokenizer.encode, ("", "a"))):
            lines.append(
                f"{flag}: the tokenizer itself puts id {token} {where} every text, and documents get it twice; leave out {flag}"
            )
    return lines


def _noted(part: Part, slices: dict[int, list[str]]) -> Part:
    slices[part.number] = [piece.path for piece in part.slices]
    return part


def _validate(options: PreprocessOptions) -> None:
    faults = []
    if not options.json_keys or len(set(options.json_keys)) != len(options.json_keys):
        faults.append(
            problem("--json-keys", list(options.json_keys), "each key once, one at least", "Correct the list")
        )
    if options.workers < 0 or options.partitions < 1:
        found = (options.workers, options.partitions)
        faults.append(
            problem(
                "--workers, --partitions",
                found,
                "workers are 0 (each core) or more, partitions 1 or more",
                "Correct them",
            )
        )
    for flag, value, other in (("--on-error", options.on_error, "fail"), ("--on-empty", options.on_empty, "keep")):
        if value not in ("skip", other):
            faults.append(problem(flag, value, f"it is skip or {other}", "Choose one"))
    for check in (lambda: check_limit(options.max_unusable), lambda: language_code(options.lang)):
        try:
            check()
        except ConfigError as error:
            faults.append(str(error))
    packages = {
        "sentencex": ("--split-sentences", options.split_sentences),
        "ray": ("--engine ray", options.engine == "ray"),
    }
    faults += [fault for package, (name, used) in packages.items() if used and (fault := lacking(package, name))]
    ENGINES.find(options.engine)
    if faults:
        raise ConfigError("\n".join(faults))


def _fingerprint(options: PreprocessOptions, inputs: Inputs, part_bytes: int, tokenizer: str) -> str:
    """Digest of everything the parts depend on: settings, tokenizer files, and name, size, time and samples of every input."""
    settings = (
        options.split_sentences,
        options.lang,
        options.keep_newlines,
        options.append_eod,
        options.prepend_bos,
        options.on_empty,
    )
    digest = hashlib.sha256(json.dumps([FORMAT, part_bytes, list(options.json_keys), settings, tokenizer]).encode())
    for path in inputs.files:
        if path in inputs.marks:
            digest.update(inputs.marks[path].encode())
            continue
        stat = os.stat(path)
        digest.update(f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}".encode())
        with open(path, "rb") as file:
            for place in (0, stat.st_size // 2, max(0, stat.st_size - 4096)):
                file.seek(place)
                digest.update(file.read(4096))
    return digest.hexdigest()


def _place(error: BadDocument, inputs: Inputs, keys: Sequence[str], part_bytes: int) -> str:
    """`file:line` of a document known by its slice; reads what comes before it in its file."""
    before: dict[str, int] = {}
    for part in cut(inputs.files, part_bytes):
        for index, piece in enumerate(part.slices):
            if (part.number, index) == (error.part, error.index):
                return inputs.shown(piece.path, before.get(piece.path, 0) + error.line)
            lines = max((batch.num_lines for _, batch in read_part(Part(0, (piece,), 0), keys)), default=0)
            before[piece.path] = before.get(piece.path, 0) + lines
    return f"part {error.part}"


def _finish(
    options: PreprocessOptions,
    job: Job,
    output: Output,
    inputs: Inputs,
    records: list[dict],
    slices: dict[int, list[str]],
    encoder: str,
    resumed: int,
    started: float,
) -> PreprocessResult:
    """Join the parts, write the report."""
    begun = time.monotonic()
    counted = ("documents", "sequences", "tokens", "bytes", "num_problems", "num_empty")
    totals: dict = {name: sum(record[name] for record in records) for name in counted}
    totals["problems"] = problems = _list_problems(records, slices, inputs)
    if not totals["documents"]:
        found = f"{totals['num_problems']} unusable ones" if totals["num_problems"] else "nothing"
        listed = "".join(f"\n  {line}" for line in problems[:5])
        cure = f"{conversion(problems)}Check --json-keys and the files"
        raise DataError(problem("--input", found, "the input holds no usable document", cure) + listed)
    _require_usable(options, totals)
    output.joining()
    for i, prefix in enumerate(output.prefixes.values()):
        parts = [part_prefix(job.folder, record["part"], i, job.key) for record in records]
        merge_datasets(parts, prefix, output.still_held)
    seconds = {stage: sum(record["seconds"][stage] for record in records) for stage in STAGES}
    seconds["joining"] = time.monotonic() - begun
    stored = {"prefixes": output.prefixes, **totals, "seconds": seconds, "resumed_parts": resumed, "encoder": encoder}
    output.finish(
        job.key, {"tokenizer": job.tokenizer, "input": list(options.input), "not_read": inputs.left, "result": stored}
    )
    return PreprocessResult(**stored, report=output.report, elapsed=time.monotonic() - started)


def _list_problems(records: list[dict], slices: dict[int, list[str]], inputs: Inputs) -> list[str]:
    """`file:line: reason` of the problems in order, the first REPORTED_PROBLEMS of them."""
    lines_before: dict[str, int] = {}
    listed: list[str] = []
    for record in records:
        paths = slices[record["part"]]
        for index, path in enumerate(paths):
            for at, line, reason in record["problems"]:
                if at == index and len(listed) < REPORTED_PROBLEMS:
                    listed.append(f"{inputs.shown(path, lines_before.get(path, 0) + line)}: {reason}")
            lines_before[path] = lines_before.get(path, 0) + record["lines"][index]
    return listed
