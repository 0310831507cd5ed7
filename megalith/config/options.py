"""How one field of a config section is declared: a dataclass field with its help text and its limits."""

from __future__ import annotations

import dataclasses
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    choices: tuple = (),
    names: tuple = (),
    flags: tuple[str, ...] = (),
    minimum: float | None = None,
) -> Any:
    """A field of a section.

    default: the value when nothing names it; None where it is derived or required.
    help: one line for `--help`, with units.
    choices: the values allowed, if they are few. minimum: the smallest number allowed.
    names: names of built-in things; a user's is module:name (a test compares them with the registry that finds them).
    flags: more spellings of the flag (`--rotary-position-embeddings-theta` beside `--rotary-base`); one that starts
        with `--no-` or `--disable-` sets a boolean to False.
    """
    metadata = {"help": help, "choices": choices, "names": names, "flags": flags, "minimum": minimum}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


section = dataclasses.dataclass(frozen=True, kw_only=True)
