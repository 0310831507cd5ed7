"""A flag for each field of a class of options: how texts are written, how a server works."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from typing import Any

from megalith.config.flags.text import flag, value_text
from megalith.generation.params import GenerationParams


def bias(text: str) -> tuple[int, float]:
    """A token and its bias: 50256=-inf."""
    token, _, value = text.rpartition("=")
    return int(token), float(value)


ARGUMENTS: dict[str, dict[str, Any]] = {  # how the flag of an option is read, by the type of its field
    "str": {"metavar": "TEXT"},
    "float": {"type": float, "metavar": "X"},
    "int": {"type": int, "metavar": "N"},
    "bool": {"action": "store_true"},
    "tuple[str, ...]": {"action": "append", "metavar": "TEXT"},
    "tuple[int, ...]": {"type": int, "nargs": "+", "metavar": "N"},
    "Mapping[int, float]": {"type": bias, "nargs": "+", "metavar": "TOKEN=X"},
}


def add_option_flags(group: argparse._ActionsContainer, cls: type, left_out: Collection[str] = ()) -> None:
    """A flag for each field of a dataclass whose fields are declared by config/options.py."""
    default = cls()
    for each in dataclasses.fields(cls):
        if each.name in left_out:
            continue
        value, help = getattr(default, each.name), str(each.metadata["help"]).replace("%", "%%")
        kind = str(each.type).removesuffix(" | None")
        how = {"action": argparse.BooleanOptionalAction} if value is True else ARGUMENTS[kind]
        if value not in (None, False, (), {}):
            help += f" (default: {'on' if value is True else value_text(value)})"
        if kind == "tuple[str, ...]":
            help += "; may be given several times"
        group.add_argument(flag(each.name), *each.metadata["flags"], default=argparse.SUPPRESS, help=help, **how)


def given_options(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """What was typed of the flags of `add_option_flags`."""
    typed = {each.name: getattr(args, each.name) for each in dataclasses.fields(cls) if hasattr(args, each.name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}


def add_sampling_flags(group: argparse._ActionsContainer, left_out: Collection[str] = ()) -> None:
    """A flag for each field of GenerationParams, and two short ones."""
    add_option_flags(group, GenerationParams, left_out)
    group.add_argument("--greedy", action="store_true", default=argparse.SUPPRESS, help="as --temperature 0")
    group.add_argument(
        "--ignore-eod", dest="stop_at_eod", action="store_false", default=argparse.SUPPRESS, help="as --no-stop-at-eod"
    )


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What was typed of the flags of `add_sampling_flags`, as fields of GenerationParams.

    Raises ConfigError for values that cannot work.
    """
    given = given_options(args, GenerationParams)
    if hasattr(args, "greedy"):
        given["temperature"] = 0.0
    params = GenerationParams().replace(**given)
    return {name: getattr(params, name) for name in given}
