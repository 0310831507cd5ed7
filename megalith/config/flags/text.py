"""Text of configuration errors: the flag of a field, what was probably meant, many problems in one message."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import NamedTuple

from megalith.common.errors import ConfigError, MegalithError, problem
from megalith.config.flags.foreign_names import megalith_name


class Problem(NamedTuple):
    """One thing that cannot work. `fields` are those it is about, so that one mistake is reported once."""

    fields: tuple[str, ...]
    text: str


class Words(str):
    """Text that a message shows without quotes: a description of what was found instead of the value itself."""

    __repr__ = str.__str__


def flag(field: str) -> str:
    """The flag of a field: num_layers -> --num-layers."""
    return "--" + field.replace("_", "-")


def value_text(value: object) -> str:
    """A value as it would be typed after its flag: ['a', 'b'] -> 'a b', 1e-05 -> '1e-05'."""
    if isinstance(value, (list, tuple)):
        return " ".join(value_text(item) for item in value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be, or None where nothing is near."""
    known = {each.removeprefix("--"): each for each in known}  # dashes alone make no two flags alike
    name = name.removeprefix("--")
    found = [each for each in known if sorted(each) == sorted(name)]  # letters that changed places, in any name
    found = found or difflib.get_close_matches(name, known, 1)
    found = found or [each for each in known if len(name) > 3 and name in each]
    return known[found[0]] if found else None


def around(value: int, fitting: Iterable[int]) -> str:
    """The fitting numbers nearest to `value`, from below and from above, as a cure names them: '1 or 3'."""
    fitting = list(fitting)
    below, above = [n for n in fitting if n < value], [n for n in fitting if n > value]
    return " or ".join(str(n) for n in (*([max(below)] if below else []), *([min(above)] if above else [])))


def divisors(number: int) -> list[int]:
    """Divisors of a number above 0, in no order; beyond 10^12 not all, so that a mistyped one is checked at once."""
    small = [n for n in range(1, min(math.isqrt(number), 10**6) + 1) if number % n == 0]
    return [*small, *(number // n for n in small)]


def multiples(value: int, unit: int) -> list[int]:
    """The multiples of `unit` above 0 on both sides of `value`, which is no multiple itself."""
    return [n for n in (value // unit * unit, (value // unit + 1) * unit) if n]


def unknown(kind: str, name: str, known: Iterable[str], otherwise: str) -> str:
    """Text for a name that is not known: what it is called here, the nearest known name, or `otherwise`."""
    if instead := megalith_name(name):
        return f"unknown {kind} {name}: {instead}"
    near = nearest(name, known)
    return f"unknown {kind} {name}: did you mean {near}?" if near else f"unknown {kind} {name}: {otherwise}"


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is among the known ones, else raise a ConfigError that names the nearest, or all."""
    known = list(known)
    if name not in known:
        raise ConfigError(unknown(kind, name, known, f"the known ones are {', '.join(known)}"))
    return name


def below_minimum(name: str, value: float | None, smallest: float | None) -> list[str]:
    """The problem of an option that is less than its `minimum`, or nothing; None is no value, or no limit."""
    if smallest is None or value is None or value >= smallest:
        return []
    return [problem(flag(name), value, f"must be at least {smallest:g}", f"Give {smallest:g} or more")]


def check_minimum(name: str, value: float | None, smallest: float | None) -> None:
    """Raise ConfigError for the problem of `below_minimum`."""
    fail(below_minimum(name, value, smallest))


def fail(problems: Iterable[str], error: type[MegalithError] = ConfigError) -> None:
    """Raise one error that holds all problems, each once; nothing happens where there are none."""
    texts = list(dict.fromkeys(problems))
    if len(texts) == 1:
        raise error(texts[0])
    if texts:
        lines = (f"  {number}. {text}" for number, text in enumerate(texts, 1))
        raise error("\n".join([f"{len(texts)} problems", *lines]))


def field_problem(fields: tuple[str, ...], what: str, found: object, rule: str, cure: str) -> Problem:
    """A Problem with the text of common/errors.py: problem; a value that is None is shown as nothing."""
    return Problem(fields, problem(what, Words("nothing") if found is None else found, rule, cure))
