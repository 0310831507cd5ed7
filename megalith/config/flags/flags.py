"""Command-line flags, made from the fields of RunConfig: their table, their help, and how they are read.

argparse prints the help. It does not read, because it stops at the first mistake, takes `-1e-5` for a flag and knows
one spelling of a dash; here every mistake of a command is found before any of it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megalith.common.errors import problem
from megalith.config.flags import legacy
from megalith.config.flags.text import Problem, Words, flag, nearest, unknown, value_text
from megalith.config.flags.values import Field, fields
from megalith.config.megatron import flags as legacy_megatron

VALUE = legacy.VALUE
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclasses.dataclass(frozen=True)
class Flag:
    """One spelling.

    sets: field -> value; VALUE stands for what follows the flag. nargs: 0, 1 or "+" values.
    by_value: value -> the same as `sets`, where the value decides what is set.
    notice: a line for the user where the flag is used. refused: why the flag cannot work, and what to do instead.
    harmless: values with which a refused flag changes nothing, so that it is accepted.
    number: what follows is a number, or several.
    """

    name: str
    sets: dict[str, Any]
    nargs: int | str = 1
    choices: tuple = ()
    by_value: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    help: str = ""
    notice: str = ""
    refused: str = ""
    harmless: tuple[str, ...] = ()
    number: bool = False


@dataclasses.dataclass
class CommandLine:
    """What a command line says: raw values by field, positional words, problems, notices; the words as typed."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    words: list[str] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    notices: list[str] = dataclasses.field(default_factory=list)
    typed: list[str] = dataclasses.field(default_factory=list)


RUN_FLAGS = (  # flags that every command with a RunConfig has beside its fields
    Flag("--recipe", {"recipe": VALUE}, help="start from this recipe (see megalith config)"),
    Flag("--config", {"config": VALUE}, help="YAML file, over the recipe and under the flags"),
    Flag(
        "--print-config",
        {"print_config": VALUE},
        choices=("changed", "all", "none"),
        help="how much of the resolved config to print",
    ),
    Flag("--dry-run", {"dry_run": True}, 0, help="resolve, check and print the config, then exit with status 0"),
)


def flag_names(field: Field) -> tuple[list[str], list[str]]:
    """Spellings of a field: those that set it (a boolean to True), and those that set a boolean to False."""
    yes, no = [flag(field.name)], []
    if field.kind is bool:
        no = [flag(field.name.removeprefix("no_")) if field.name.startswith("no_") else "--no-" + flag(field.name)[2:]]
    for name in field.metadata["flags"]:
        (no if field.kind is bool and name.startswith(("--no-", "--disable-")) else yes).append(name)
    return yes, no


@functools.cache
def config_flags() -> dict[str, Flag]:
    """Every flag that sets a field of RunConfig, and every flag of Megatron that is renamed, not needed or refused."""
    found = {}
    for field in fields().values():
        yes, no = flag_names(field)
        nargs = 0 if field.kind is bool else "+" if field.kind is list else 1
        for name in yes:
            notice = "" if name == yes[0] or nargs == 0 else f"{name} is read as {yes[0]}"
            if field.metadata["help"].startswith("accepted"):
                notice = f"{name} is {field.metadata['help']}"
            found[name] = Flag(name, {field.name: True if nargs == 0 else VALUE}, nargs, notice=notice)
        for name in no:
            found[name] = Flag(name, {field.name: False}, 0)
    for name, sets in legacy.RENAMED.items():
        found[name] = Flag(name, sets, 1 if VALUE in sets.values() else 0, notice=f"{name} is read as {_typed(sets)}")
    for name, by_value in legacy.BY_VALUE.items():
        found[name] = Flag(name, {}, choices=tuple(by_value), by_value=by_value, notice=f"{name} is read as ")
    for name, (nargs, reason) in legacy_megatron.not_needed().items():
        notice = f"{name} is not needed: {reason}"
        choices = legacy_megatron.CHOICES.get(name, ())
        number = nargs != 0 and not choices and name not in legacy_megatron.PATHS
        found[name] = Flag(name, {}, nargs, choices, notice=notice, number=number)
    for name, (nargs, harmless, reason) in legacy_megatron.REFUSED.items():
        notice = f"{name} {VALUE} changes nothing here"
        found[name] = Flag(name, {}, nargs, refused=reason, harmless=harmless, notice=notice)
    return found


def _typed(sets: dict[str, Any]) -> str:
    """What is set, as one would type it: {'bf16': False, 'lr': 1} -> '--no-bf16 --lr 1'."""
    words = []
    for key, value in sets.items():
        if isinstance(value, bool):
            words.append(flag(key) if value else f"--no-{flag(key)[2:]}")
        else:
            words.append(f"{flag(key)} {value_text(value)}")
    return " ".join(words)


def read(argv: Sequence[str], command_flags: Iterable[Flag] = RUN_FLAGS) -> CommandLine:
    """Read the words after a verb against the config flags and the flags of the verb itself."""
    return read_against({**config_flags(), **{flag.name: flag for flag in command_flags}}, argv)


def read_against(
    table: Mapping[str, Flag], argv: Sequence[str], *, verb: str = "pretrain", until_word: bool = False
) -> CommandLine:
    """Read the words after `verb` against a table of flags.

    `--flag value`, `--flag=value`; underscores count as dashes; the last of several wins. Nothing is raised: what is
    wrong is in the problems of the result, all of it.
    until_word: the first word that is neither flag nor value, and all after it, are not read but are `words`.
    """
    result, at = CommandLine(typed=list(argv)), 0
    while at < len(argv):
        word = argv[at]
        at += 1
        if word not in table and (not word.startswith("--") or word == "--"):
            if until_word:
                result.words = list(argv[at if word == "--" else at - 1 :])
                break
            result.words.append(word)
            continue
        name, equals, value = word.partition("=")
        following = at
        while following < len(argv) and not argv[following].startswith("--"):
            following += 1
        found = table.get(name) or table.get(name.replace("_", "-"))
        if found is None:
            result.problems.append(_unknown(name, table, verb))
            if not until_word:
                at = following  # its values, whatever they are, are no positional words
            elif (meant := table.get(_meant(result.problems[-1].text))) is None:
                break  # whether it has a value, and where the words begin, nobody knows
            elif not equals and meant.nargs:
                at = min(at + 1, following)
            continue
        if equals:
            values = [value]
        else:
            take = {0: 0, "?": 1, 1: 1}.get(found.nargs, following - at)
            values = list(argv[at : min(at + take, following)])
            at += len(values)
        _use(found, name, values, result)
    return result


def _unknown(name: str, table: Mapping[str, Flag], verb: str) -> Problem:
    text = unknown("flag", name, table, f"megalith {verb} --help lists them")
    near = _meant(text)
    return Problem(tuple(table[near].sets) if near else (), text)  # what was meant is not reported as missing too


def _meant(text: str) -> str:
    """The flag that the text of an unknown one proposes, or ""."""
    near = re.search(r"did you mean (\S+)\?$", text)
    return near[1] if near else ""


def _use(found: Flag, name: str, values: list[str], result: CommandLine) -> None:
    about = tuple(found.sets)

    def report(value: object, rule: str, cure: str) -> None:
        result.problems.append(Problem(about, problem(name, value, rule, cure)))

    if found.nargs in (1, "+") and not values:
        report(Words("nothing"), "must have a value", f"Write {name} followed by a value")
        return
    raw: Any = values if found.nargs == "+" else values[0] if values else None
    if found.choices and raw not in found.choices and values:
        near = nearest(str(raw), found.choices) or nearest(str(raw).lower(), found.choices) or found.choices[0]
        report(raw, f"must be one of {', '.join(found.choices)}", f"Write {name} {near}")
        return
    wrong = [value for value in values if found.number and not NUMBER.fullmatch(value)]
    if wrong:
        report(wrong[0], "must be a number", f"Write {name} 1, or leave it out")
        return
    if found.refused and raw not in found.harmless:
        typed = name if raw is None else f"{name} {value_text(raw)}"
        result.problems.append(Problem((), f"{typed} cannot be used: {found.refused}"))
        return
    sets = found.sets
    if found.nargs == 0 and values:  # --swiglu=false
        if values[0].lower() not in ("true", "false"):
            report(values[0], "must be on or off, and takes no value", f"Write {name} or {name}=false")
            return
        if values[0].lower() == "false":
            sets = {key: not value for key, value in sets.items() if isinstance(value, bool)}
    chosen = {key: raw if value is VALUE else value for key, value in sets.items()}
    if found.by_value:
        chosen = found.by_value[str(raw)]
    result.values |= chosen
    notice = found.notice.replace(VALUE, value_text(raw)) + (_typed(chosen) if found.by_value else "")
    if notice and notice not in result.notices:
        result.notices.append(notice)


def whole_number(reading: CommandLine, name: str) -> int | None:
    """The count that a flag of the verb gives; None where it is not typed, or wrong, which is added to the problems."""
    value = reading.values.get(name)
    if value is None:
        return None
    if value.isdecimal() and int(value) > 0:
        return int(value)
    text = problem(flag(name), value, "must be a whole number above 0", f"Write {flag(name)} 4")
    reading.problems.append(Problem((), text))
    return None


def add_command_help(
    parser: argparse.ArgumentParser, command_flags: Iterable[Flag], title: str = "this command"
) -> None:
    """Add the flags of a verb itself to `parser`, for its --help."""
    group = parser.add_argument_group(title)
    for each in command_flags:
        if each.nargs == 0:
            group.add_argument(each.name, action="store_true", help=each.help)
        else:
            metavar = "N" if each.number else each.name.rpartition("-")[2].upper()
            choices = "{" + ",".join(each.choices) + "}" if each.choices else metavar
            group.add_argument(each.name, metavar=choices, help=each.help)


def add_help(parser: argparse.ArgumentParser, command_flags: Iterable[Flag] = RUN_FLAGS) -> None:
    """Add all flags to `parser`, grouped by section, for its --help; read() is what reads them."""
    command_flags = tuple(command_flags)
    add_command_help(parser, command_flags)
    groups, own = dict[str, Any](), {each.name for each in command_flags}
    for field in fields().values():
        group = groups.get(field.section) or groups.setdefault(field.section, parser.add_argument_group(field.section))
        yes, no = flag_names(field)
        if own.intersection(yes):  # the verb reads it itself
            continue
        text = field.metadata["help"].replace("%", "%%")
        if field.default is True:
            text += " (on by default)"
        elif field.default not in (None, False, []):
            text += f" (default: {value_text(field.default)})".replace("%", "%%")
        if field.kind is bool:
            group.add_argument(*yes, *no, action="store_true", dest=field.name, help=text)
        else:
            many = {"nargs": "+"} if field.kind is list else {}
            metavar = {int: "N", float: "X", list: "VALUE"}.get(field.kind, "TEXT")
            if field.metadata["choices"]:
                metavar = "{" + ",".join(map(str, field.metadata["choices"])) + "}"
            group.add_argument(*yes, metavar=metavar, dest=field.name, help=text, **many)
