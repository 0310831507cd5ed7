"""The files of texts that the steps of `megalith detoxify` read and write, JSON lines all of them."""

from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from megalith.common.errors import DataError, problem
from megalith.common.files import write_text
from megalith.common.json_lines import LONE_SURROGATE, parse
from megalith.config.flags.text import Words
from megalith.evaluation.texts import JSON_LINES, read_text

Record = dict[str, Any]


def write_records(path: pathlib.Path, records: Iterable[Record]) -> None:
    """A line for each, atomically."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path: str | pathlib.Path, flag: str, take: Callable[[Any], Any], rule: str) -> Iterator[Any]:
    """What `take` makes of the value of each line that is not blank.

    Raises DataError with file and line where a line is no JSON, or `take` raises KeyError, TypeError or ValueError;
    rule: what it then must be. flag: the one that names the file, in the error for one that cannot be read or is empty.
    """
    for number, line in enumerate(read_text(str(path), flag).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = parse(line)
        except ValueError as error:
            raise DataError(problem(where, line[:60], f"must be JSON ({error})", "Correct the line")) from None
        try:
            found = take(value)
        except (KeyError, TypeError, ValueError):
            raise DataError(problem(where, line[:60], rule, "Correct the line, or leave it out")) from None
        yield found


def read_texts(path: str | pathlib.Path, flag: str) -> list[str]:
    """Generated texts: those of `megalith generate --out-file`, or objects with "text" as Megatron's are."""
    return list(read_records(path, flag, _text, 'must have a string "text", or "prompt" and "continuation"'))


def _text(value: Any) -> str:
    return checked(value["text"] if "text" in value else value["prompt"] + value["continuation"])


def read_continuations(path: str | pathlib.Path, flag: str) -> list[str]:
    """What `megalith generate --out-file` has written after the prompts."""
    return list(read_records(path, flag, lambda value: checked(value["continuation"]), 'must have a "continuation"'))


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: lines of text, or JSON lines with {"prompt": {"text": ...}} as RealToxicityPrompts has
    them, {"prompt": ...}, or strings. Raises DataError for what is no prompt, blank ones among them.
    """
    if path.endswith(JSON_LINES):
        rule = 'must be a prompt: a string, {"prompt": "..."} or {"prompt": {"text": "..."}}, and not blank'
        return list(read_records(path, "--prompt-file", _prompt, rule))
    return [line for line in read_text(path, "--prompt-file").split("\n") if line.strip()]


def _prompt(value: Any) -> str:
    prompt = value["prompt"] if isinstance(value, dict) else value
    text = checked(prompt["text"] if isinstance(prompt, dict) else prompt)
    if not text.strip():
        raise ValueError
    return text


def checked(text: Any) -> str:
    """The text. Raises TypeError for what is none, ValueError for half a character, which no file can hold."""
    if not isinstance(text, str):
        raise TypeError
    if LONE_SURROGATE.search(text):
        raise ValueError
    return text


def toxicity_of(record: Any) -> float | None:
    """The score in a line that step score has written."""
    return None if record["score"] is None else float(record["score"]["toxicity"])


def scored(text: str, toxicity: float | None) -> Record:
    """A line of step score, in the form that Megatron's annotations have."""
    return {"text": text, "score": None if toxicity is None else {"toxicity": toxicity}}


def cleanest(records: Sequence[Record], fraction: float, seed: int) -> list[Record]:
    """The texts with the lowest scores, a fraction of those that have one, in a random order.

    (Megatron's filter-selfgeneration.py takes half of all lines, those without a score among them.) Of equal scores the
    first ones stay. Raises DataError where nothing would.
    """
    ranked = sorted((record for record in records if toxicity_of(record) is not None), key=toxicity_of)
    kept = ranked[: int(len(ranked) * fraction)]
    if not kept:
        rule = f"must leave a text to train on, and {fraction:g} of {len(ranked)} with a score is none"
        raise DataError(problem("--keep-fraction", Words(f"{len(records)} texts"), rule, "Generate more texts"))
    random.Random(seed).shuffle(kept)
    return kept
