"""The prompts of `megalith generate`: from flags, a file, or standard input."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable

from megalith.common.encodings import conversion_advice, reason
from megalith.common.errors import DataError, problem
from megalith.common.pointers import refuse_pointer


def read_prompts(prompts: list[str] | None = None, prompt_file: str | None = None) -> list[str] | None:
    """The prompts given, those of a file, or that of standard input where something is piped in; None for no prompt.

    Raises DataError with file and line for what cannot be read.
    """
    if prompts is not None:
        return prompts
    if prompt_file is None:
        text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
        if text and not text.strip():
            print("megalith: standard input is blank: the text starts from the end-of-document token", file=sys.stderr)
        return [text.removesuffix("\n")] if text.strip() else None
    path = pathlib.Path("/dev/stdin" if prompt_file == "-" else prompt_file)
    refuse_pointer(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: a form feed may be part of a prompt
    except (OSError, UnicodeDecodeError) as error:
        cure = (
            conversion_advice([reason(error)]).rstrip(". ")
            if isinstance(error, UnicodeDecodeError)
            else "Check the path"
        )
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(problem("--prompt-file", str(path), f"must be a readable UTF-8 file ({why})", cure)) from None
    parse: Callable[[str, str], str] = _json_prompt if path.suffix.lower() == ".jsonl" else lambda line, _: line
    found = [parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(problem("--prompt-file", str(path), "must hold at least one prompt", "Write one prompt a line"))
    if blank := [number for number, line in enumerate(lines[:-1], 1) if not line.strip()]:
        numbers = f"{', '.join(map(str, blank[:10]))}{' and more' * (len(blank) > 10)}"
        left_out = f"left out {len(blank)} blank line{'s' * (len(blank) > 1)} ({numbers}), which hold no prompt"
        print(f'megalith: {path}: {left_out}; an empty prompt is "" in a .jsonl file', file=sys.stderr)
    return found


def _json_prompt(line: str, where: str) -> str:
    from megalith.common.json_lines import LONE_SURROGATE, parse  # here, because it imports orjson

    try:
        value = parse(line)
    except ValueError as error:
        raise DataError(problem(where, line[:60], f"must be JSON ({error})", "Correct the line")) from None
    found = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(found, str):
        raise DataError(
            problem(where, line[:60], 'must be a string or an object with a string "prompt"', "Correct the line")
        )
    if half := LONE_SURROGATE.search(found):
        raise DataError(problem(where, line[:60], f"holds the unpaired surrogate {half[0]!a}", "Correct the line"))
    return found
