"""The prompts of `megalith generate`, from flags, a file, or standard input, each with its options."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from megalith.common.encodings import conversion_advice, reason
from megalith.common.errors import ConfigError, DataError, problem
from megalith.common.pointers import refuse_pointer
from megalith.generation.params import GenerationParams, unknown_option

OPTIONS = ["greedy", *(each.name for each in dataclasses.fields(GenerationParams))]


def read_prompts(
    prompts: list[str] | None, prompt_file: str | None, params: GenerationParams
) -> tuple[list[str], list[GenerationParams]]:
    """The prompts given, those of a file, or that of standard input where something is piped in, and the options of
    each; one empty prompt where there is none.

    params: the options of all, which an object of a .jsonl file may change for its prompt. Raises DataError with file
    and line for what cannot be read, and ConfigError for options that cannot work.
    """
    if prompts is None and prompt_file is None:
        text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
        if text and not text.strip():
            print("megalith: standard input is blank: the text starts without a prompt", file=sys.stderr)
        prompts = [text.removesuffix("\n")] if text.strip() else [""]
    if prompts is not None:
        return prompts, [params] * len(prompts)
    found = _read_file(pathlib.Path("/dev/stdin" if prompt_file == "-" else str(prompt_file)), params)
    return [prompt for prompt, _ in found], [each for _, each in found]


def _read_file(path: pathlib.Path, params: GenerationParams) -> list[tuple[str, GenerationParams]]:
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
    found, ignored, json = list[tuple[str, GenerationParams]](), dict[str, None](), path.suffix.lower() == ".jsonl"
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt, options = _json_prompt(line, f"{path}, line {number}") if json else (line, {})
        try:
            found.append((prompt, params.replace(**{name: options[name] for name in options if name in OPTIONS})))
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        ignored.update(dict.fromkeys(name for name in options if name not in OPTIONS))
    if not found:
        raise DataError(problem("--prompt-file", str(path), "must hold at least one prompt", "Write one prompt a line"))
    if blank := [number for number, line in enumerate(lines[:-1], 1) if not line.strip()]:
        numbers = f"{', '.join(map(str, blank[:10]))}{' and more' * (len(blank) > 10)}"
        left_out = f"left out {len(blank)} blank line{'s' * (len(blank) > 1)} ({numbers}), which hold no prompt"
        print(f'megalith: {path}: {left_out}; an empty prompt is "" in a .jsonl file', file=sys.stderr)
    if ignored:
        print(f"megalith: {path}: keys that are no options are not used: {', '.join(ignored)}", file=sys.stderr)
    return found


def _json_prompt(line: str, where: str) -> tuple[str, Mapping[str, Any]]:
    """A prompt and the other keys of its object, none of which is a mistyped option."""
    from megalith.common.json_lines import LONE_SURROGATE, parse  # here, because it imports orjson

    try:
        value = parse(line)
    except ValueError as error:
        raise DataError(problem(where, line[:60], f"must be JSON ({error})", "Correct the line")) from None
    options = dict(value) if isinstance(value, dict) else {"prompt": value}
    found = options.pop("prompt", None)
    if not isinstance(found, str):
        raise DataError(
            problem(where, line[:60], 'must be a string or an object with a string "prompt"', "Correct the line")
        )
    if half := LONE_SURROGATE.search(found):
        raise DataError(problem(where, line[:60], f"holds the unpaired surrogate {half[0]!a}", "Correct the line"))
    for name in options:
        if name not in OPTIONS and difflib.get_close_matches(name, OPTIONS, 1, cutoff=0.75):
            raise ConfigError(f"{where}: {unknown_option(name, OPTIONS)}")
    return found, options
