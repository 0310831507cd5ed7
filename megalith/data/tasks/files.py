"""The rows of a task's files: tables (.tsv, .csv) and JSON lines (all others), each row with its line number."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from megalith.common.errors import DataError, problem
from megalith.common.json_lines import parse
from megalith.config.flags.text import Words
from megalith.data.corpus.compression import SUFFIXES, open_decompressed
from megalith.data.tasks.description import Columns, TaskDescription

NO_LABELS = "Name a file with labels; one without is for --valid-data, where it is predicted"


class BadRow(NamedTuple):
    """A row that cannot be used, and why."""

    file: str
    line: int
    why: str


class Row(NamedTuple):
    """A row. values: {column of the task: value}, "label" among them where the file has labels."""

    line: int
    values: Mapping[str, Any]


class Rows(NamedTuple):
    """The rows of a file. labelled: whether they have labels."""

    labelled: bool
    rows: list[Row]
    bad: list[BadRow]


def files_of(paths: Sequence[str], task: TaskDescription, flag: str) -> list[list[pathlib.Path]]:
    """The files of each path: itself, or those in a folder. Raises DataError where there is none."""
    found = []
    for text in paths:
        path = pathlib.Path(text)
        files = sorted(path.rglob(task.files)) if path.is_dir() else [path] if path.exists() else []
        if not files:
            rule = f"must be a file, or a folder of {task.files}"
            there = f"a folder of {len(list(path.iterdir()))} others" if path.is_dir() else text
            raise DataError(
                problem(flag, Words(f"{text}, {there}") if path.is_dir() else text, rule, "Correct the path")
            )
        found.append(files)
    return found


def read_rows(path: pathlib.Path, task: TaskDescription) -> Rows:
    """The rows of a file, those that cannot be read listed apart.

    Raises DataError where the file is empty, or lacks a column that the task names.
    """
    lines = iter(_lines(path))
    rows = _objects(lines, path, task) if _suffix(path) not in (".tsv", ".csv") else _table(lines, path, task)
    if not rows.rows and not rows.bad:
        rule, cure = "must have rows of the task", "Name another file"
        raise DataError(problem(str(path), Words("an empty file, or one of a header alone"), rule, cure))
    return rows


def _suffix(path: pathlib.Path) -> str:
    """The end of a name that says what a file holds: .tsv of train.tsv.gz."""
    return next((each for each in reversed(path.suffixes) if each not in SUFFIXES), "")


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """(number from 1, text without its end) of each line; an error in the place of what is not UTF-8."""
    with open_decompressed(str(path)) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield number, error


def _table(lines: Iterator[tuple[int, Any]], path: pathlib.Path, task: TaskDescription) -> Rows:
    """Rows of a .tsv, in which quotes are text as in GLUE's, or of a .csv, in which they are not."""
    bad: list[BadRow] = []
    cells = _csv_cells(lines, path, bad) if _suffix(path) == ".csv" else _tsv_cells(lines, path, bad)
    first = next(cells, None)
    if first is None:
        return Rows(True, [], bad)
    names, width = first[1], len(first[1])
    labelled, places = _places(names, path, task)
    has_header = task.header or not labelled
    rows: list[Row] = []
    for line, row in cells if has_header else _chain(first, cells):
        if len(row) != width:
            bad.append(BadRow(str(path), line, f"it has {len(row)} columns, and the first line {width}"))
        else:
            rows.append(Row(line, {name: row[place] for name, place in places.items()}))
    return Rows(labelled, rows, bad)


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _tsv_cells(
    lines: Iterator[tuple[int, Any]], path: pathlib.Path, bad: list[BadRow]
) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines:
        if isinstance(line, UnicodeDecodeError):
            bad.append(BadRow(str(path), number, f"it is not UTF-8: {line.reason}"))
        elif line:
            yield number, line.split("\t")


def _csv_cells(
    lines: Iterator[tuple[int, Any]], path: pathlib.Path, bad: list[BadRow]
) -> Iterator[tuple[int, list[str]]]:
    def texts() -> Iterator[str]:
        for number, line in lines:
            if isinstance(line, UnicodeDecodeError):
                bad.append(BadRow(str(path), number, f"it is not UTF-8: {line.reason}"))
            else:
                yield f"{line}\n"

    reader = csv.reader(texts())
    for row in reader:
        if row:
            yield reader.line_num, row


def _places(names: Sequence[str], path: pathlib.Path, task: TaskDescription) -> tuple[bool, dict[str, int]]:
    """(whether the file has labels, {column of the task: its number}), from the first line of a table."""
    label = task.columns["label"]
    without = task.unlabelled or {name: place for name, place in task.columns.items() if name != "label"}
    # A label by number is there where that column is, unless the names are those of files without labels alone.
    names_without = {place for place in without.values() if isinstance(place, str)} - set(task.columns.values())
    if isinstance(label, str):
        labelled = label in names
    else:
        labelled = -len(names) <= label < len(names) and not (names_without and names_without <= set(names))
    columns: Columns = task.columns if labelled else without
    missing = [
        place for place in columns.values()
        if (place not in names if isinstance(place, str) else not -len(names) <= place < len(names))
    ]  # fmt: skip
    if missing:
        called = ", ".join(map(repr, missing))
        rule = f"must have the column{'s' * (len(missing) > 1)} {called} of the task {task.name} in its first line"
        shown = Words(f"{len(names)} columns, {', '.join(map(repr, names[:20]))}")
        raise DataError(problem(str(path), shown, rule, "Correct the file, or the names in a task of your own"))
    numbers = {
        name: list(names).index(place) if isinstance(place, str) else place % len(names)
        for name, place in columns.items()
    }
    return labelled, numbers


def _objects(lines: Iterator[tuple[int, Any]], path: pathlib.Path, task: TaskDescription) -> Rows:
    """Rows of JSON lines. The file has labels where any of its rows has."""
    rows, bad = list[tuple[int, Any]](), list[BadRow]()
    for number, line in lines:
        try:
            if isinstance(line, UnicodeDecodeError):
                raise ValueError(f"not UTF-8: {line.reason}")
            if line.strip():
                value = parse(line)
                if not isinstance(value, dict):
                    raise ValueError(f"not a JSON object but {type(value).__name__}")
                rows.append((number, value))
        except ValueError as error:
            bad.append(BadRow(str(path), number, f"it cannot be read: {error}"))
    label = str(task.columns["label"])
    labelled = any(label in value for _, value in rows) or not rows
    columns = task.columns if labelled or not task.unlabelled else task.unlabelled
    wanted = {name: str(place) for name, place in columns.items() if labelled or name != "label"}
    found: list[Row] = []
    for number, value in rows:
        missing = [place for name, place in wanted.items() if place not in value and name != "uid"]
        if missing:
            bad.append(BadRow(str(path), number, f"it has no {' and no '.join(missing)}, only {', '.join(value)}"))
        else:
            found.append(Row(number, {name: value[place] for name, place in wanted.items() if place in value}))
    return Rows(labelled, found, bad)
