"""Which files the paths, globs, directories and streams of --input mean, and of what format each is."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from megalith.common.errors import DataError, problem
from megalith.common.extras import require
from megalith.config.flags.text import Words
from megalith.data.corpus.compression import (
    COMPRESSIONS,
    PARQUET_SIGNATURE,
    SUFFIXES,
    check_readable,
    compression,
    first_bytes,
)

FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".jsonlines": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
# Packages that a format or a compression is read with.
REQUIRED_PACKAGES: dict[str | None, str] = {"parquet": "pyarrow.parquet", ".zst": "zstandard"}
NUMBER_SUFFIX = re.compile(r"[.-]\d+(-of-\d+)?$")  # a.jsonl.1, a.jsonl-00000-of-00010
# The beginnings of JSON files that megalith writes beside a corpus: a report of `data preprocess`, a tokenizer.json.
OWN_JSON = re.compile(rb'\{\s*("key": "[0-9a-f]{64}",\s*"samples"|"version": "1\.0",\s*"truncation")')
ABOUT_THE_CORPUS = re.compile(r"(readme|licen[cs]e|changelog|citation|contributing|notice)\b", re.IGNORECASE)
STANDARD_INPUT = "-"
MAX_LISTED = 20  # names listed in one line
Notice = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The files to read, in order, and the files beside them that are not read.

    not_read: (path, reason).
    names: path of a file that a stream was copied into -> the stream's name.
    digests: path of such a file -> digest of its content, which identifies it where the path means nothing.
    """

    files: list[str]
    not_read: list[tuple[str, str]]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def location(self, path: str, line: int) -> str:
        """`file:line` as messages show it; a text file is one document and has no line."""
        name = self.names.get(path, path)
        return name if file_format(path)[0] == "text" else f"{name}:{line}"

    def report_not_read(self, notice: Notice) -> None:
        """Call `notice` with a line for each reason for which files are not read."""
        for reason in dict.fromkeys(reason for _, reason in self.not_read):
            paths = [path for path, other in self.not_read if other == reason]
            more = f" and {len(paths) - MAX_LISTED} more" if len(paths) > MAX_LISTED else ""
            notice(f"not read, {reason}: {', '.join(paths[:MAX_LISTED])}{more}")


def format_by_name(path: str) -> tuple[str | None, str]:
    """The format and compression by a file's name alone, in the values of file_format."""
    stem, suffix = os.path.splitext(NUMBER_SUFFIX.sub("", os.path.basename(path).lower()))
    packed = SUFFIXES.get(suffix, "")
    return FORMATS.get(os.path.splitext(NUMBER_SUFFIX.sub("", stem))[1] if packed else suffix), packed


def file_format(path: str) -> tuple[str | None, str]:
    """("json" | "parquet" | "text" | None where the name does not say, ".gz" | ".zst" | ".bz2" | ".xz" | "").

    First bytes decide on compression and parquet. The name decides between lines of JSON and text, and decides all
    where the file cannot be read.
    """
    kind, packed = format_by_name(path)
    if head := first_bytes(path):
        packed = compression(head)
        if head.startswith(PARQUET_SIGNATURE) and kind != "text":
            kind = "parquet"
    return kind, packed


def is_stream(path: str) -> bool:
    """Whether `path` can be read only once: standard input, a FIFO, a process substitution, a file without a name."""
    return _descriptor(path) is not None or (
        os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path)
    )


def _descriptor(path: str) -> int | None:
    """The file descriptor of this process that `path` means, if it means one."""
    found = re.fullmatch(r"-|/dev/stdin|/dev/fd/(\d+)|/proc/self/fd/(\d+)", path)
    return int(found[1] or found[2] or 0) if found else None


def resolve_inputs(patterns: Sequence[str]) -> Inputs:
    """The files meant by files, globs, directories and streams (`-`: standard input), in order.

    A directory stands for the corpus files below it, sorted by path, also behind links; its other files are in
    `not_read`. A file named twice is read once. Raises DataError for a name that matches nothing and for a file that
    can hold no documents, MissingPackage where a file cannot be read without a package.
    """
    paths: list[str] = []
    not_read: list[tuple[str, str]] = []
    for pattern in patterns:
        count = len(not_read)
        files = _expand_pattern(pattern, not_read)
        if not files:
            names = f"{' '.join(sorted(FORMATS))}, also {' '.join(COMPRESSIONS)}"
            rule = f"must name a file, a glob, a directory with files named {names}, or - for standard input"
            found = Words(f"{pattern}, which means no file")
            text = problem("--input", found, rule, "Correct the path, and quote a glob")
            refused = not_read[count : count + MAX_LISTED]
            raise DataError(text + "".join(f"\n  not read, {reason}: {path}" for path, reason in refused))
        paths += files
    first: dict[str, str] = {}
    for path in paths:
        number = _descriptor(path)
        real = os.path.realpath(path) if number is None else f"open file {number}"
        if real not in first:
            first[real] = path
        else:
            not_read.append((path, "files that are read already, under this name or another"))
    for path in first.values():
        if not is_stream(path):
            _check_file(path)
    return Inputs(list(first.values()), not_read)


def _check_file(path: str) -> None:
    """Raise where the file cannot be read: MissingPackage, or DataError for what holds no documents."""
    for package in filter(None, map(REQUIRED_PACKAGES.get, file_format(path))):
        require(package, path)
    check_readable(path)


def find_inputs(patterns: Sequence[str], notice: Notice = lambda line: None) -> list[str]:
    """The files of `resolve_inputs`; `notice` is called with lines on those that are not read."""
    inputs = resolve_inputs(patterns)
    inputs.report_not_read(notice)
    return inputs.files


def _expand_pattern(pattern: str, not_read: list[tuple[str, str]]) -> list[str]:
    """The files that one value of --input means; those that are not read go to `not_read`."""
    if pattern == STANDARD_INPUT or os.path.exists(pattern):
        return [_regular_file(pattern)] if not os.path.isdir(pattern) else _corpus_files_below(pattern, not_read)
    matched = sorted(glob.glob(pattern, recursive=True))
    files = [path for path in matched if not os.path.isdir(path)]
    if "**" in pattern:  # the glob itself has matched the files in the folders
        return [path for path in files if _is_corpus(path, not_read, named=True)]
    chosen: list[str] = []
    for path in matched:
        if os.path.isdir(path):
            chosen += _corpus_files_below(path, not_read)
        elif _is_corpus(path, not_read, named=True):
            chosen.append(path)
    return chosen


def _regular_file(path: str) -> str:
    """The file behind a file descriptor where it has a name and is read from its start: it need not be copied."""
    number = _descriptor(path)
    try:
        if (
            number is not None
            and os.lseek(number, 0, os.SEEK_CUR) == 0
            and os.path.isfile(real := os.path.realpath(f"/dev/fd/{number}"))
        ):
            return real
    except OSError:  # a pipe
        pass
    return path


def _corpus_files_below(folder: str, not_read: list[tuple[str, str]]) -> list[str]:
    """Corpus files below a folder, sorted by path; the others go to `not_read`.

    Links to folders are followed, each folder once.
    """
    chosen: list[str] = []
    seen = {os.path.realpath(folder)}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        for path in sorted(os.path.join(here, name) for name in os.listdir(here)):
            if os.path.basename(path).startswith("."):
                if not path.endswith(".lock"):  # locks of writers of other files in this folder
                    not_read.append((path, "hidden"))
            elif not os.path.isdir(path):
                chosen += [path] if _is_corpus(path, not_read) else []
            elif path.endswith(".parts") and os.path.isfile(os.path.join(path, "key")):
                not_read.append((path, "unfinished work of `data preprocess`"))
            elif os.path.realpath(path) in seen:
                not_read.append((path, "a folder that is read already"))
            else:
                seen.add(os.path.realpath(path))
                waiting.append(path)
    texts = [path for path in chosen if format_by_name(path)[0] == "text"]
    if len(texts) < len(chosen):  # else these texts may be the corpus
        about = [path for path in texts if ABOUT_THE_CORPUS.match(os.path.basename(path))]
        not_read += [(path, "texts about a corpus, beside its files (name them to read them)") for path in about]
        chosen = [path for path in chosen if path not in about]
    return sorted(chosen)


def _is_corpus(path: str, not_read: list[tuple[str, str]], named: bool = False) -> bool:
    """Whether the file is read; if not, it goes to `not_read`.

    named: a glob names it, so its suffix does not matter.
    """
    reason = ""
    if not os.path.exists(path):
        reason = "links to nothing"
    elif not os.path.isfile(path) and not named:
        reason = "no ordinary files (name them to read them)"
    elif path.endswith(".json") and OWN_JSON.match(first_bytes(path)):
        reason = "reports of `data preprocess` and vocabularies"
    elif not named and format_by_name(path)[0] is None:
        reason = "names that no corpus file has (name them to read them)"
    if reason:
        not_read.append((path, reason))
    return not reason


@contextlib.contextmanager
def spooled(inputs: Inputs, folder: Callable[[], pathlib.Path], notice: Notice = lambda line: None) -> Iterator[Inputs]:
    """The inputs with streams copied into files, which processes can read in parts; removed at the end of the block.

    folder: called once where there is a stream, for the path of a folder that is made and removed here.
    """
    streams = [path for path in inputs.files if is_stream(path)]
    if not streams:
        yield inputs
        return
    spool = folder()
    names: dict[str, str] = {}
    digests: dict[str, str] = {}
    with contextlib.ExitStack() as cleanup:
        spool.mkdir(parents=True)
        cleanup.callback(spool.rmdir)
        files = []
        try:
            for path in inputs.files:
                if path in streams:
                    shown = "standard input" if path in (STANDARD_INPUT, "/dev/stdin") else path
                    target = spool / f"{len(names)}"
                    cleanup.callback(target.unlink, missing_ok=True)
                    end = ", to its end (Ctrl-D)" if _is_terminal(path) else ""
                    notice(f"{shown} is copied to {target}, because parts of it are read at the same time{end}")
                    digest = _copy(path, target)
                    path = str(target)
                    names[path], digests[path] = shown, digest
                    _check_file(path)
                files.append(path)
            yield dataclasses.replace(inputs, files=files, names=names, digests=digests)
        except DataError as error:  # the copy is removed before the user reads the message: name the stream instead
            message = str(error)
            for path in reversed(names):
                message = message.replace(path, names[path])
            if message == str(error):
                raise
            raise DataError(message) from error


def _is_terminal(path: str) -> bool:
    number = _descriptor(path)
    return number is not None and os.isatty(number)


def _copy(stream: str, target: pathlib.Path) -> str:
    """Copy a stream to its end; returns the digest of its content."""
    digest, number = hashlib.sha256(), _descriptor(stream)
    try:
        source = os.open(stream, os.O_RDONLY) if number is None else os.dup(number)
    except OSError as error:
        rule = f"cannot be read ({error})"
        raise DataError(problem("--input", stream, rule, "Give a file, or pipe something in")) from error
    with open(source, "rb") as file, open(target, "wb") as copy:
        while block := file.read(1 << 20):
            digest.update(block)
            copy.write(block)
    return digest.hexdigest()
