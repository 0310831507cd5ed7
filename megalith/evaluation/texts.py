"""The texts that are evaluated, from plain-text files and JSON lines; what cannot be read is an error with its line."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from megalith.common.encodings import conversion_advice, reason
from megalith.common.errors import DataError, problem
from megalith.common.json_lines import LONE_SURROGATE, parse
from megalith.common.pointers import refuse_pointer

FLAG = "--valid-data"
JSON_LINES = (".jsonl", ".json")


class Text(NamedTuple):
    """A text, where it stands ("file, line 3") and what it counts for: its file, or the field that names a source."""

    text: str
    where: str
    source: str


def read_text(path: str, flag: str = FLAG) -> str:
    """The whole of a UTF-8 file that `flag` names. Raises DataError where it cannot be read, or holds no text."""
    refuse_pointer(path)
    try:
        text = pathlib.Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why, cure = reason(error), conversion_advice([reason(error)]).rstrip(". ")
        raise DataError(problem(flag, path, f"must be a UTF-8 file; it is {why}", cure)) from None
    except OSError as error:
        rule = f"must be a readable file ({error.strerror or error})"
        raise DataError(problem(flag, path, rule, "Correct the path")) from None
    if not text.strip():
        raise DataError(problem(flag, path, "must hold text, and this file holds none", "Name another file"))
    return text


def read_json_lines(path: str, key: str = "text", source_key: str | None = None) -> list[Text]:
    """The texts of JSON lines: strings, or objects with the text under `key`, and their source under `source_key`.

    Raises DataError with the line of what is no such thing, or holds no text. Blank lines are passed over.
    """
    texts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            texts.append(_text(line, where, path, key, source_key))
    return texts


def _text(line: str, where: str, path: str, key: str, source_key: str | None) -> Text:
    try:
        value = parse(line)
    except ValueError as error:
        cure = "Correct the line, or name a file of JSON lines"
        raise DataError(problem(where, line[:60], f"must be JSON ({error})", cure)) from None
    text, source = value, path
    if isinstance(value, dict):
        text, source = value.get(key), value.get(source_key, path) if source_key else path
        if source_key and source_key not in value:
            rule = f'must have the field "{source_key}" of --source-key'
            raise DataError(problem(where, sorted(value), rule, "Name a field that every line has"))
    if not isinstance(text, str):
        rule, cure = f'must be a string, or an object with a string "{key}"', "Correct the line, or name the field"
        raise DataError(problem(where, line[:60], rule, cure))
    if not text.strip():
        raise DataError(problem(where, text[:60], "must hold text", "Correct the line, or leave it out"))
    if half := LONE_SURROGATE.search(text):
        raise DataError(problem(where, line[:60], f"holds the unpaired surrogate {half[0]!a}", "Correct the line"))
    return Text(text, where, str(source))


def read_texts(path: str, key: str, source_key: str | None) -> list[Text]:
    """The texts of a file: of JSON lines where its name ends so, otherwise one."""
    if path.endswith(JSON_LINES):
        return read_json_lines(path, key, source_key)
    return [Text(read_text(path), path, path)]
