"""Questions with their answers, and whether a text holds one: files of Natural Questions and of DPR, DPR's matching.

Formats: `question TAB list of answers` as Python writes a list (nq-dev.csv of DPR), JSON lines of {question, answer}
(NQ-open), and a JSON list of {question, answers, positive_ctxs, negative_ctxs, hard_negative_ctxs} (DPR). A list is
read as a literal: nothing that a file holds is evaluated.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import sys
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from megalith.common import json_lines
from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words
from megalith.data.corpus.compression import open_decompressed

MATCHES = ("string", "regex")
UNREADABLE = (
    OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError, csv.Error, RecursionError
)  # fmt: skip
LONGEST = 1_000_000  # characters of a list of answers


@dataclasses.dataclass(frozen=True)
class Passage:
    """A passage of a question of DPR."""

    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, and the answers of which any is right. Passages: that hold an answer, that do not, and that do not
    though a search found them.
    """

    text: str
    answers: tuple[str, ...]
    positives: tuple[Passage, ...] = ()
    negatives: tuple[Passage, ...] = ()
    hard_negatives: tuple[Passage, ...] = ()


def read_questions(path: str | os.PathLike) -> list[Question]:
    """All questions of a file, by its form. Raises DataError that names file and line."""
    path = pathlib.Path(path)
    try:
        with _open(path) as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
        with _open(path) as file:
            if first == "[":
                found = list(_read_dpr(path, json.load(file)))
            else:
                found = list(_read_json_lines(path, file) if first == "{" else _read_table(path, file))
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as questions ({error}). Correct the file.") from None
    if not found:
        raise DataError(problem(str(path), Words("no question"), "must have questions", "Name another file"))
    return found


def _open(path: pathlib.Path) -> io.TextIOWrapper:
    """The text of a file, also of a compressed one, as DPR's downloads are."""
    return io.TextIOWrapper(open_decompressed(str(path)), encoding="utf-8", newline="")


def _read_table(path: pathlib.Path, file: Any) -> Iterator[Question]:
    rows = csv.reader(file, delimiter="\t")
    for row in rows:
        if not row:
            continue
        where = f"{path}, line {rows.line_num}"
        if len(row) != 2:
            rule = "must have a question and a list of answers, with one tab between them"
            raise DataError(problem(where, Words(f"{len(row)} fields"), rule, "Correct the line"))
        yield Question(row[0].strip(), parse_answers(row[1], where))


def _read_json_lines(path: pathlib.Path, file: Any) -> Iterator[Question]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                value = json_lines.parse(line)
            except ValueError as error:
                rule = "must be JSON"
                raise DataError(problem(f"{path}, line {number}", Words(str(error)[:80]), rule, "Correct it")) from None
            yield _question(value, f"{path}, line {number}")


def _read_dpr(path: pathlib.Path, values: Any) -> Iterator[Question]:
    for number, value in enumerate(values, 1):
        yield _question(value, f"{path}, entry {number}")


def _question(value: Any, where: str) -> Question:
    answers = value.get("answers", value.get("answer")) if isinstance(value, dict) else None
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not isinstance(value.get("question"), str):
        rule = "must be an object with a `question` and a list of `answers`"
        raise DataError(problem(where, Words(repr(value)[:80]), rule, "Correct it"))
    passages = {}
    for name in ("positive_ctxs", "negative_ctxs", "hard_negative_ctxs"):
        rows = value.get(name) or []
        if not all(isinstance(each, dict) and isinstance(each.get("text"), str) for each in rows):
            rule = f"must have {name} that are objects with a `text`"
            raise DataError(problem(where, Words(repr(rows)[:80]), rule, "Correct it"))
        passages[name] = tuple(Passage(str(each.get("title") or ""), each["text"]) for each in rows)
    return Question(value["question"], _texts(answers, where), *passages.values())


def parse_answers(text: str, where: str = "The answers") -> tuple[str, ...]:
    """The answers in a list as Python writes it: ["Mount Rainier", 'Tahoma']. Anything but a literal is refused."""
    rule = "must be a list of texts, as Python writes it; nothing in it is evaluated"
    cure = """Write it as ["answer", "answer"]"""
    try:
        value = ast.literal_eval(text.strip()) if len(text) <= LONGEST else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise DataError(problem(where, text[:80], rule, cure)) from None
    if not isinstance(value, (list, tuple)):
        raise DataError(problem(where, text[:80], rule, cure))
    return _texts(value, where)


def _texts(values: Sequence[Any], where: str) -> tuple[str, ...]:
    if wrong := [value for value in values if not isinstance(value, (str, int, float))]:
        raise DataError(problem(where, Words(repr(wrong[0])[:80]), "must have answers that are texts", "Correct it"))
    return tuple(map(str, values))


def normalize(text: str) -> str:
    """Characters taken apart (Unicode's NFD), so that an accent is a character of its own."""
    return unicodedata.normalize("NFD", text)


@functools.cache
def _word_pattern() -> re.Pattern:
    """Words of letters, numbers and marks, and each other character that is neither white space nor control."""
    kinds: dict[str, list[tuple[int, int]]] = {"word": [], "blank": []}
    for code in range(sys.maxunicode + 1):
        kind = unicodedata.category(chr(code))[0]
        name = "word" if kind in "LNM" else "blank" if kind in "ZC" else None
        if name is None:
            continue
        ranges = kinds[name]
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1] = ranges[-1][0], code
        else:
            ranges.append((code, code))
    sets = {
        name: "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in ranges)
        for name, ranges in kinds.items()
    }
    return re.compile(f"[{sets['word']}]+|[^{sets['word']}{sets['blank']}]")


def words(text: str) -> list[str]:
    """The words of a text as DPR's SimpleTokenizer cuts it, in lower case."""
    return [word.lower() for word in _word_pattern().findall(normalize(text))]


class Matcher:
    """Whether a passage holds one of a question's answers, by DPR's rules. Passages are cut into words once.

    string: the words of an answer follow one another in the passage. regex: the passage has a match of the answer as a
    regular expression, whatever the case; an answer that is none matches nothing. An answer without any word matches
    nothing either (in DPR, everything).
    """

    def __init__(self, match: str = "string"):
        """Raises ConfigError for another `match`."""
        if match not in MATCHES:
            rule = f"must be one of {', '.join(MATCHES)}"
            raise ConfigError(problem("--faiss-match", match, rule, "Write --faiss-match string"))
        self.match = match
        self.prepared = functools.lru_cache(maxsize=1 << 16)(_joined if match == "string" else normalize)

    def __call__(self, answers: Sequence[str], passage: str) -> bool:
        """Whether the passage holds one of the answers."""
        text = self.prepared(passage)
        if self.match == "string":
            return any(len(joined) > 1 and joined in text for joined in map(_joined, answers))
        return any(_search(answer, text) for answer in answers)


def _joined(text: str) -> str:
    """Words with a separator that no word has before, between and after them."""
    return "\0" + "".join(f"{word}\0" for word in words(text))


def _search(answer: str, text: str) -> bool:
    try:
        return re.search(normalize(answer), text, re.IGNORECASE | re.MULTILINE) is not None
    except (re.error, RecursionError, OverflowError):
        return False
