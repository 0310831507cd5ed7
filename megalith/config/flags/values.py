"""From text and YAML scalars to the types that the fields declare."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import problem
from megalith.config.flags.text import Problem, flag
from megalith.config.run import RunConfig


@dataclasses.dataclass(frozen=True)
class Field:
    """What is known of one field of RunConfig: where it is, its type, its default, its limits."""

    name: str
    section: str
    kind: type  # int, float, bool, str, or list
    item: type  # of a list's elements
    optional: bool
    default: Any
    metadata: Mapping


KINDS: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "list": list}


@functools.cache
def fields() -> dict[str, Field]:
    """Every field of RunConfig by its flat name, in the order of the sections."""
    return {name: field for part, empty in vars(RunConfig()).items() for name, field in fields_of(empty, part).items()}


def fields_of(empty: Any, section: str) -> dict[str, Field]:
    """Every field of a section by its name; `empty` is one with all defaults."""
    found = {}
    for field in dataclasses.fields(empty):
        kind, _, rest = str(field.type).partition(" | ")
        base, _, item = kind.partition("[")
        found[field.name] = Field(
            name=field.name,
            section=section,
            kind=KINDS[base],
            item=KINDS[item.rstrip("]") or "str"],
            optional=rest == "None",
            default=getattr(empty, field.name),
            metadata=field.metadata,
        )
    return found


TYPE_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", list: "a list"}
EXAMPLES = {int: "4", float: "0.1", bool: "true", str: "text", list: "1 2 3"}


def convert(field: Field, raw: Any, called: str) -> tuple[Any, Problem | None]:
    """The typed value of `raw`, or a problem; `called` is the name the user gave it ('--lr', 'run.yaml: lr').

    Numbers may be text ('1e-4', which YAML 1.1 reads as text), whole numbers may be written 1e6, and 'none' unsets an
    optional field and empties a list.
    """
    if field.optional and (raw is None or (isinstance(raw, str) and raw.lower() in ("none", "null"))):
        return None, None
    try:
        if field.kind is list:
            items = raw if isinstance(raw, (list, tuple)) else str(raw).split()
            if [str(item).lower() for item in items] == ["none"]:
                return [], None
            return [_convert_scalar(field.item, item) for item in items], None
        return _convert_scalar(field.kind, raw), None
    except (ValueError, TypeError, OverflowError):
        wanted = TYPE_NAMES[field.kind]
        if field.kind is list:
            wanted = f"{wanted} of {TYPE_NAMES[field.item].removeprefix('a ')}s"
        rule = f"must be {wanted}{', or none' if field.optional else ''} ({field.metadata['help']})"
        return None, Problem((field.name,), problem(called, raw, rule, _cure(field, raw)))


def _cure(field: Field, raw: Any) -> str:
    """What to write instead of `raw`: 1k and 2M are meant as thousands, or as powers of 1024."""
    match = re.fullmatch(r"(\d+)([kKmMgG])[bB]?", str(raw))
    if match and field.kind is int:
        power = "kmg".index(match[2].lower()) + 1
        return f"Write {flag(field.name)} {int(match[1]) * 1000**power}, or {int(match[1]) * 1024**power}"
    return f"Give it as in {flag(field.name)} {EXAMPLES[field.kind]}"


def _convert_scalar(kind: type, raw: Any) -> Any:
    if kind is bool:
        if isinstance(raw, bool):
            return raw
        word = str(raw).lower()
        return word == "true" if word in ("true", "false") else _refuse(raw)
    if isinstance(raw, (bool, dict, list, tuple)) or raw is None:
        return _refuse(raw)
    if kind is str:
        return str(raw)
    if kind is int:
        try:
            return int(str(raw))
        except ValueError:
            number = float(raw)
            return int(number) if number.is_integer() else _refuse(raw)
    number = float(raw)
    return number if math.isfinite(number) else _refuse(raw)


def _refuse(raw: Any) -> Any:
    raise ValueError(raw)
