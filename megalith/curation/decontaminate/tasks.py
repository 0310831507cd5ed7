"""The texts of evaluation tasks, read from their files in the form in which they are published.

What is taken of each is what Megatron-LM's filter_ngrams.py takes: contexts and questions, so that neither can be
learned by heart.
"""

from __future__ import annotations

import glob
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megalith.common.errors import ConfigError, DataError, problem
from megalith.common.json_lines import parse
from megalith.config.flags.text import Words, unknown
from megalith.data.corpus.compression import open_decompressed
from megalith.data.questions import read_questions


def _json(path: str) -> Any:
    with open_decompressed(path) as stream:
        return json.loads(stream.read().decode("utf-8"))


def _lines(path: str) -> Iterator[dict]:
    with open_decompressed(path) as stream:
        for line in stream:
            if line.strip():
                yield parse(line)


def _first(path: str) -> bytes:
    """The first byte that is no white space."""
    with open_decompressed(path) as stream:
        return stream.read(64).lstrip()[:1]


def lambada(path: str) -> Iterator[str]:
    """Lines of {"text"}."""
    return (record["text"] for record in _lines(path))


def squad(path: str) -> Iterator[str]:
    """{"data": [{"paragraphs": [{"context", "qas": [{"question"}]}]}]}."""
    for article in _json(path)["data"]:
        for paragraph in article["paragraphs"]:
            yield paragraph["context"]
            yield from (each["question"] for each in paragraph["qas"])


def natural_questions(path: str) -> Iterator[str]:
    """Lines of {"question"} (NQ-open), {"question_text"} (Google's); `question TAB [answers]`, a list of them (DPR)."""
    if _first(path) != b"{":
        yield from (question.text for question in read_questions(path))
        return
    for record in _lines(path):
        yield record["question"] if "question" in record else record["question_text"]


def triviaqa(path: str) -> Iterator[str]:
    """{"Data": [{"Question"}]}."""
    return (each["Question"] for each in _json(path)["Data"])


def webqs(path: str) -> Iterator[str]:
    """A list of {"utterance"} (WebQuestions as published), or lines of {"question"} or {"utterance"}."""
    for each in _json(path) if _first(path) == b"[" else _lines(path):
        yield each["utterance"] if "utterance" in each else each["question"]


def race(path: str) -> Iterator[str]:
    """A folder of .txt files, or lines: {"article", "questions": [...]} each."""
    files = (
        sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.txt"), recursive=True))
        if os.path.isdir(path)
        else [path]
    )
    for file in files:
        for record in _lines(file):
            yield record["article"]
            yield from record["questions"] if isinstance(record["questions"], list) else [record["question"]]


def drop(path: str) -> Iterator[str]:
    """{passage id: {"passage", "qa_pairs": [{"question"}]}}."""
    for each in _json(path).values():
        yield each["passage"]
        yield from (pair["question"] for pair in each["qa_pairs"])


def coqa(path: str) -> Iterator[str]:
    """{"data": [{"story", "questions": [{"input_text"}]}]}."""
    for each in _json(path)["data"]:
        yield each["story"]
        yield from (question["input_text"] for question in each["questions"])


def piqa(path: str) -> Iterator[str]:
    """Lines of {"goal", "sol1", "sol2"}."""
    for record in _lines(path):
        yield from (record[key] for key in ("goal", "sol1", "sol2"))


TASKS: dict[str, Callable[[str], Iterable[str]]] = {
    "lambada": lambada,
    "squad": squad,
    "natural_questions": natural_questions,
    "nq": natural_questions,
    "triviaqa": triviaqa,
    "webqs": webqs,
    "webqa": webqs,
    "race": race,
    "drop": drop,
    "coqa": coqa,
    "piqa": piqa,
}


def parse_task(text: str) -> tuple[str, str, str]:
    """(name, path, key) of NAME=PATH, or NAME=PATH:KEY for any JSON lines. Raises ConfigError for other texts."""
    name, equals, path = text.partition("=")
    key = ""
    if name not in TASKS and ":" in path:
        path, _, key = path.rpartition(":")
    if not equals or not name or not path:
        rule = "must be NAME=PATH, or NAME=PATH:KEY for the texts under a key of JSON lines"
        raise ConfigError(problem("--tasks", text, rule, "Write lambada=lambada_test.jsonl"))
    if name not in TASKS and not key:
        near = unknown("task", name, TASKS, f"there are {', '.join(TASKS)}")
        raise ConfigError(f"{near}; any other file needs its key, {name}={path}:KEY")
    if not os.path.exists(path):
        raise ConfigError(problem("--tasks", text, "must name a file that exists", "Correct the path"))
    return name, path, key


def read_task(name: str, path: str, key: str) -> list[str]:
    """The texts of a task. Raises DataError where the file is not in the task's form."""
    try:
        if key:
            texts = [record[key] for record in _lines(path)]
        else:
            texts = list(TASKS[name](path))
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise ValueError(f"no text but {wrong!r:.60}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        form = (TASKS[name].__doc__ or "").strip() if not key else f"lines of {{{key!r}}}"
        found = Words(f"{type(error).__name__}: {str(error)[:100]}")
        rule = f"must have the form of {name}: {form.rstrip('.')}"
        raise DataError(problem(path, found, rule, "Give the file as it is published, or NAME=PATH:KEY")) from error
    if not texts:
        raise DataError(problem(path, Words("nothing"), f"must hold texts of {name}", "Give another file"))
    return texts


def task_files(path: str) -> list[str]:
    """The files that a task is read from."""
    return [str(each) for each in sorted(pathlib.Path(path).rglob("*.txt"))] if os.path.isdir(path) else [path]
