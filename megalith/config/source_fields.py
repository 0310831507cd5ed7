"""Fields of other programs' configurations (config.json, Megatron's arguments), checked by type and range. No torch.

    given = checked(given, table, "Llama/config.json")

leaves out null ones, makes 32 of 32.0 where a whole number is meant, or raises one error with everything that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from megalith.common.errors import CheckpointError, problem
from megalith.config.checks.checks import violated_limit
from megalith.config.flags.text import fail, value_text
from megalith.config.flags.values import fields

TYPE_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "an object",
}


class FieldType(NamedTuple):
    """What a field may be. least, most: its range. item: of a list's elements. null: whether null has a meaning."""

    kind: type
    least: float | None = None
    most: float | None = None
    choices: tuple = ()
    item: type | None = None
    null: bool = False


class RunField(NamedTuple):
    """A field with the type and the range of a field of RunConfig."""

    name: str
    null: bool = False


Table = Mapping[str, FieldType | RunField]
CURE = "Correct it there, or copy the original file again"


def checked(given: Mapping[str, Any], table: Table, where: str, cure: str = CURE) -> dict[str, Any]:
    """`given` with each field of the table of its type. Fields that are null are left out, unless null has a meaning.

    Raises CheckpointError with every field that is of another type or out of its range; `where` names the file.
    """
    found, problems = dict(given), list[str]()
    for name in table.keys() & given.keys():
        kind, value = table[name], given[name]
        if value is None:
            if not kind.null:
                del found[name]
            continue
        if isinstance(kind, RunField):
            found[name] = value = as_whole_number(value, fields()[kind.name].kind)
            rule = (violated_limit(kind.name, value) or ("",))[0].partition(" (the default")[0]
        else:
            found[name] = value = as_whole_number(value, kind.kind)
            rule = _broken_rule(kind, value)
        if rule:
            quoted = " (without quotation marks)" if isinstance(value, str) and _number(value) else ""
            problems.append(problem(f"{where}: {name}", value, f"{rule}{quoted}", cure))
    fail(sorted(problems), CheckpointError)
    return found


def as_whole_number(value: Any, kind: type) -> Any:
    """32 for 32.0 where a whole number is meant; everything else as it is."""
    return int(value) if kind is int and isinstance(value, float) and value.is_integer() else value


def _broken_rule(kind: FieldType, value: Any) -> str:
    """The rule of its type that `value` breaks; "" where it breaks none."""
    if not _has_type(value, kind.kind) or (kind.item and not all(_has_type(each, kind.item) for each in value)):
        elements = f", each of its elements {TYPE_NAMES[kind.item]}" if kind.item else ""
        return f"must be {TYPE_NAMES[kind.kind]}{elements}"
    if kind.choices and value not in kind.choices:
        return f"must be one of {', '.join(map(str, kind.choices))}"
    if (kind.least is not None and value < kind.least) or (kind.most is not None and value > kind.most):
        bounds = [f"at least {value_text(kind.least)}"] * (kind.least is not None)
        bounds += [f"at most {value_text(kind.most)}"] * (kind.most is not None)
        return f"must be {' and '.join(bounds)}"
    return ""


def _has_type(value: Any, kind: type) -> bool:
    """Whether a value is of a kind: whole numbers are numbers, true and false are not."""
    if isinstance(value, bool) != (kind is bool):
        return False
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, (list, tuple) if kind is list else kind)


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
