"""Which files are meant by the paths, globs, directories and streams of --input, and of what kind each is."""

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
from megalith.data.corpus.compression import COMPRESSIONS, PARQUET, SUFFIXES, check_readable, compression, first_bytes

FORMATS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".jsonlines": "json", ".parquet": "parquet", ".txt": "text", ".text": "text",
    ".md": "text",
}  # fmt: skip
NEEDED: dict[str | None, str] = {
    "parquet": "pyarrow.parquet",
    ".zst": "zstandard",
}  # packages that a format or a compression is read with
NUMBERED = re.compile(r"[.-]\d+(-of-\d+)?$")  # a.jsonl.1, a.jsonl-00000-of-00010
OWN = re.compile(
    rb'\{\s*("key": "[0-9a-f]{64}",\s*"samples"|"version": "1\.0",\s*"truncation")'
)  # a report; a tokenizer.json
ABOUT = re.compile(r"(readme|licen[cs]e|changelog|citation|contributing|notice)\b", re.IGNORECASE)
STANDARD_INPUT = "-"
TOLD = 20  # names in one line
Notice = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The files to read, in order, and what lay beside them.

    left: (path, why it is not read). names: what a file that holds a stream is called. marks: its digest, for its path means nothing.
    """

    files: list[str]
    left: list[tuple[str, str]]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    marks: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def shown(self, path: str, line: int) -> str:
        """`file:line` as people are told it; a text file is one document and has no lines."""
        name = self.names.get(path, path)
        return name if file_format(path)[0] == "text" else f"{name}:{line}"

    def tell(self, notice: Notice) -> None:
        """A line for each reason for which files are not read."""
        for reason in dict.fromkeys(reason for _, reason in self.left):
            paths = [path for path, other in self.left if other == reason]
            more = f" and {len(paths) - TOLD} more" if len(paths) > TOLD else ""
            notice(f"not read, {reason}: {', '.join(paths[:TOLD])}{more}")


def name_format(path: str) -> tuple[str | None, str]:
    """The format and compression that a file's name speaks of, as file_format gives them."""
    stem, suffix = os.path.splitext(NUMBERED.sub("", os.path.basename(path).lower()))
    packed = SUFFIXES.get(suffix, "")
    return FORMATS.get(os.path.splitext(NUMBERED.sub("", stem))[1] if packed else suffix), packed


def file_format(path: str) -> tuple[str | None, str]:
    """("json" | "parquet" | "text" | None when the name does not tell, ".gz" | ".zst" | ".bz2" | ".xz" | "").

    First bytes decide on compression and parquet; the name decides between lines of JSON and text, and on what cannot be read.
    """
    kind, packed = name_format(path)
    if head := first_bytes(path):
        kind, packed = "parquet" if head.startswith(PARQUET) and kind != "text" else kind, compression(head)
    return kind, packed


def is_stream(path: str) -> bool:
    """Whether `path` can be read once only: standard input, a FIFO, a process substitution, what has no name any more."""
    return _descriptor(path) is not None or (
        os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path)
    )


def _descriptor(path: str) -> int | None:
    """The number of this process's open file that `path` means, if it means one."""
    found = re.fullmatch(r"-|/dev/stdin|/dev/fd/(\d+)|/proc/self/fd/(\d+)", path)
    return int(found[1] or found[2] or 0) if found else None


def look_for(patterns: Sequence[str]) -> Inputs:
    """The files meant by files, globs, directories and streams (`-`: standard input), in order.

    A directory stands for the corpus files below it, sorted by path, also behind links; what is not taken of it is in `left`.
    A file named twice is read once. Raises DataError for a name that matches nothing and for
    what can hold no documents, MissingPackage where a file cannot be read without one.
    """
    found: list[str] = []
    left: list[tuple[str, str]] = []
    for pattern in patterns:
        before = len(left)
        below = _meant(pattern, left)
        if not below:
            names = " ".join(sorted(FORMATS))
            rule = f"it is a file, a glob, a directory with files named {names}, also {' '.join(COMPRESSIONS)}, or - for standard input"
            there = "".join(f"\n  not read, {reason}: {path}" for path, reason in left[before : before + TOLD])
            raise DataError(
                problem("--input", pattern, f"no file is meant by it; {rule}", "Correct the path, and quote a glob")
                + there
            )
        found += below
    first: dict[str, str] = {}
    for path in found:
        number = _descriptor(path)
        real = os.path.realpath(path) if number is None else f"open file {number}"
        if real not in first:
            first[real] = path
        else:
            left.append((path, "files that are read already, under this name or another"))
    for path in first.values():
        if not is_stream(path):
            _check(path)
    return Inputs(list(first.values()), left)


def _check(path: str) -> None:
    """Raise where the file cannot be read: MissingPackage, or DataError for what holds no documents."""
    for package in filter(None, map(NEEDED.get, file_format(path))):
        require(package, path)
    check_readable(path)


def find_inputs(patterns: Sequence[str], notice: Notice = lambda line: None) -> list[str]:
    """The files of `look_for`; what it leaves out is told."""
    inputs = look_for(patterns)
    inputs.tell(notice)
    return inputs.files


def _meant(pattern: str, left: list[tuple[str, str]]) -> list[str]:
    if pattern == STANDARD_INPUT or os.path.exists(pattern):
        return [_plain_name(pattern)] if not os.path.isdir(pattern) else _below(pattern, left)
    matched = sorted(glob.glob(pattern, recursive=True))
    files = [path for path in matched if not os.path.isdir(path)]
    if "**" in pattern:  # it has matched what lies in the folders by itself
        return [path for path in files if _is_corpus(path, left, named=True)]
    chosen: list[str] = []
    for path in matched:
        chosen += _below(path, left) if os.path.isdir(path) else [path] if _is_corpus(path, left, named=True) else []
    return chosen


def _plain_name(path: str) -> str:
    """The file behind an open file's number where it has a name and is read from its start: it need not be copied."""
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


def _below(folder: str, left: list[tuple[str, str]]) -> list[str]:
    """Corpus files below a folder, sorted by path; the others go to `left`. Links to folders are followed, each folder once."""
    chosen: list[str] = []
    seen = {os.path.realpath(folder)}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        for path in sorted(os.path.join(here, name) for name in os.listdir(here)):
            if os.path.basename(path).startswith("."):
                if not path.endswith(".lock"):  # those of writers of other files here
                    left.append((path, "hidden"))
            elif not os.path.isdir(path):
                chosen += [path] if _is_corpus(path, left) else []
            elif path.endswith(".parts") and os.path.isfile(os.path.join(path, "key")):
                left.append((path, "unfinished work of `data preprocess`"))
            elif os.path.realpath(path) in seen:
                left.append((path, "a folder that is read already"))
            else:
                seen.add(os.path.realpath(path))
                waiting.append(path)
    about = [path for path in chosen if ABOUT.match(os.path.basename(path)) and name_format(path)[0] == "text"]
    if any(name_format(path)[0] != "text" for path in chosen):  # else they may be all the text that there is
        left += [(path, "texts about a corpus, beside its files (name them to read them)") for path in about]
        chosen = [path for path in chosen if path not in about]
    return sorted(chosen)


def _is_corpus(path: str, left: list[tuple[str, str]], named: bool = False) -> bool:
    """Whether the file is read, else it goes to `left`. named: by a glob, which need not go by suffixes."""
    reason = ""
    if not os.path.exists(path):
        reason = "links to nothing"
    elif not os.path.isfile(path) and not named:
        reason = "no ordinary files (name them to read them)"
    elif path.endswith(".json") and OWN.match(first_bytes(path)):
        reason = "reports of `data preprocess` and vocabularies"
    elif not named and name_format(path)[0] is None:
        reason = "names that no corpus file has (name them to read them)"
    if reason:
        left.append((path, reason))
    return not reason


@contextlib.contextmanager
def spooled(inputs: Inputs, folder: Callable[[], pathlib.Path], notice: Notice = lambda line: None) -> Iterator[Inputs]:
    """The inputs with streams copied into files, which can be cut and read by many; removed at the end of the block.

    folder: called once where there is a stream, for a folder that is made and removed here.
    """
    streams = [path for path in inputs.files if is_stream(path)]
    if not streams:
        yield inputs
        return
    place = folder()
    names: dict[str, str] = {}
    marks: dict[str, str] = {}
    with contextlib.ExitStack() as cleared:
        place.mkdir(parents=True)
        cleared.callback(place.rmdir)
        files = []
        try:
            for path in inputs.files:
                if path in streams:
                    shown = "standard input" if path in (STANDARD_INPUT, "/dev/stdin") else path
                    target = place / f"{len(names)}"
                    cleared.callback(target.unlink, missing_ok=True)
                    end = ", to its end (Ctrl-D)" if _is_terminal(path) else ""
                    notice(f"{shown} is copied to {target}, because parts of it are read at one time{end}")
                    mark = _copy(path, target)
                    path = str(target)
                    names[path], marks[path] = shown, mark
                    _check(path)
                files.append(path)
            yield dataclasses.replace(inputs, files=files, names=names, marks=marks)
        except DataError as error:  # the copy is gone by the time that somebody reads of it
            told = str(error)
            for path in reversed(names):
                told = told.replace(path, names[path])
            if told == str(error):
                raise
            raise DataError(told) from error


def _is_terminal(path: str) -> bool:
    number = _descriptor(path)
    return number is not None and os.isatty(number)


def _copy(stream: str, target: pathlib.Path) -> str:
    """Copy a stream to its end; the digest of what came."""
    digest, number = hashlib.sha256(), _descriptor(stream)
    try:
        source = os.open(stream, os.O_RDONLY) if number is None else os.dup(number)
    except OSError as error:
        raise DataError(
            problem("--input", stream, f"it cannot be read ({error})", "Give a file, or pipe something in")
        ) from error
    with open(source, "rb") as file, open(target, "wb") as copy:
        while block := file.read(1 << 20):
            digest.update(block)
            copy.write(block)
    return digest.hexdigest()
