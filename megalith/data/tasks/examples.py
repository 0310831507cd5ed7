"""From rows to examples: cleaned texts, a label as a number; as Megatron's tasks make them (tasks/glue, tasks/race)."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megalith.common.errors import DataError, problem
from megalith.config.flags.text import Words
from megalith.data.tasks.description import TaskDescription
from megalith.data.tasks.files import NO_LABELS, BadRow, Row, read_rows

SHOWN = 5  # malformed rows that an error names


class Example(NamedTuple):
    """One example. pairs: (first text, second text or "") of each choice, one where there are none."""

    uid: str
    pairs: tuple[tuple[str, str], ...]
    label: float  # the class, the right choice, or a number to learn; 0 where there is no label


class Examples(NamedTuple):
    """The examples of some files."""

    labelled: bool
    examples: list[Example]
    bad: list[BadRow]


def read_examples(files: Sequence[pathlib.Path], task: TaskDescription, *, training: bool) -> Examples:
    """All examples of some files, in their order. Rows that cannot be used are listed apart.

    Files have labels or not, all alike. Raises DataError for files without labels where training needs them, and where
    no row can be used.
    """
    tables = [(file, read_rows(file, task)) for file in files]
    labelled = any(rows.labelled for _, rows in tables)
    if training and not labelled:
        rule = f"must have labels to train on, in the column {task.columns['label']!r}"
        raise DataError(problem(f"--train-data {tables[0][0]}", Words("none"), rule, NO_LABELS))
    examples, bad = list[Example](), list[BadRow]()
    for file, rows in tables:
        bad += rows.bad
        if labelled and not rows.labelled:
            bad += [BadRow(str(file), row.line, f"it has no {task.columns['label']}") for row in rows.rows]
            continue
        for row in rows.rows:
            try:
                examples += _make_examples(row, file, task, labelled)
            except ValueError as error:
                bad.append(BadRow(str(file), row.line, str(error)))
    if not examples:
        shown = "; ".join(f"line {each.line}: {each.why}" for each in bad[:SHOWN])
        rule = f"must have rows of the task {task.name}"
        what = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        raise DataError(problem(what, Words(f"{len(bad)} that cannot be used ({shown})"), rule, "Correct the file"))
    return Examples(labelled, examples, bad)


def _make_examples(row: Row, file: pathlib.Path, task: TaskDescription, labelled: bool) -> Iterator[Example]:
    """The example of a row, or several of an article with several questions. Raises ValueError that says why not."""
    values = row.values
    if task.kind == "multiple_choice":
        yield from _questions(row, file, task, labelled)
        return
    texts = [_text(values, name) for name in ("text_a", "text_b") if name in values]
    label = 0.0
    if labelled:
        label = _number(values["label"]) if task.kind == "regression" else _class(values["label"], task)
    yield Example(str(values.get("uid", row.line)), ((texts[0], texts[1] if len(texts) > 1 else ""),), label)


def _questions(row: Row, file: pathlib.Path, task: TaskDescription, labelled: bool) -> Iterator[Example]:
    """The examples of an article: its questions are one text, or lists of texts, options and labels."""
    values = row.values
    article = _text(values, "context") if "context" in values else ""
    several = isinstance(values["question"], list)
    columns = [values[name] if several else [values[name]] for name in ("question", "options", "label")[: 2 + labelled]]
    if len({len(column) if isinstance(column, list) else -1 for column in columns}) > 1:
        counts = ", ".join(str(len(column)) if isinstance(column, list) else "no list" for column in columns)
        raise ValueError(f"it has different numbers of questions, options and answers: {counts}")
    uid = str(values.get("uid", file.stem if several else row.line))
    made = []  # an article counts whole or not at all
    for number, (question, options, *answers) in enumerate(zip(*columns)):
        if not isinstance(options, list) or len(options) != task.choices:
            found = len(options) if isinstance(options, list) else "no list of"
            raise ValueError(f"question {number + 1} has {found} options, not {task.choices}")
        label = _choice(answers[0], task) if labelled else 0
        pairs = tuple((clean_text(fill_in(str(question), str(option))), article) for option in options)
        made.append(Example(f"{uid}-{row.line}-{number}" if several else uid, pairs, label))
    yield from made


def _text(values: Any, name: str) -> str:
    text = clean_text(str(values[name]))
    if not text:
        raise ValueError(f"its {name} is empty")
    return text


def _class(value: Any, task: TaskDescription) -> int:
    label = str(value).strip()
    if label not in task.labels:
        raise ValueError(f"its label {label!r} is none of {', '.join(task.labels)}")
    return task.labels.index(label)


def _choice(value: Any, task: TaskDescription) -> int:
    """A to D, or 0 to 3."""
    text = str(value).strip().upper()
    number = ord(text) - ord("A") if len(text) == 1 and text.isalpha() else int(text) if text.isdecimal() else -1
    if not 0 <= number < task.choices:
        raise ValueError(f"its answer {value!r} is none of {', '.join(map(chr, range(65, 65 + task.choices)))}")
    return number


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"its label {value!r} is no number")
    return number


def clean_text(text: str) -> str:
    """Megatron's: line ends and runs of spaces become one space, and a full stop has none before it."""
    text = re.sub(r"\s+", " ", text)
    for _ in range(3):
        text = text.replace(" . ", ". ")
    return text.strip()


def fill_in(question: str, option: str) -> str:
    """A question with an option: in the place of its blank, or behind it.

    Megatron replaces each underscore; a blank of several would hold the option as often, so that here they are one.
    """
    if "_" in question:
        return re.sub("_+", lambda blank: option, question)
    return f"{question} {option}"
