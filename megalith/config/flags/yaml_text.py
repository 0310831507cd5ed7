"""YAML text to raw values by field: grouped by section or flat, old spellings too, every mistake named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import ConfigError, problem
from megalith.config.flags import flags
from megalith.config.flags.text import Problem, Words, flag, unknown
from megalith.config.flags.values import fields

NO_SPACE = re.compile(r"\s*(?:- )?(\w+):([^\s/\\:]\S*)")  # `name:value`, which YAML takes for one word


def _missing_space(found: str) -> tuple[str, str] | None:
    """(reason, cure) where a text begins with the name of a field or section, a colon and no space; None where not."""
    match = NO_SPACE.match(found)
    names = {*fields(), *(field.section for field in fields().values())}
    if match is None or match[1] not in names:
        return None
    reason = f"{match[1]}:{match[2]} has no space after the colon, so that YAML reads one word"
    return reason, f"Write {match[1]}: {match[2]}"


def load_yaml(text: str, source: str) -> Any:
    """What a YAML text holds. Raises ConfigError with line, rule and cure where it is not YAML, or has a key twice."""
    import yaml  # here, because most commands and every --help do without it

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ConfigError(_invalid(source, text, error)) from error


def parse_yaml(text: str, source: str, problems: list[Problem], notices: list[str]) -> dict[str, Any]:
    """Raw values by field of a YAML text, its keys grouped by section or flat. A top-level `about` is for people."""
    try:
        tree = load_yaml(text, source)
    except ConfigError as error:
        problems.append(Problem(tuple(fields()), str(error)))
        return {}
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        rule = "must map names to values, as in 'model:' and below it '  num_layers: 4'"
        cure = "Correct the file; megalith config writes one"
        if missing_space := _missing_space(str(tree)):
            rule, cure = f"must map names to values: {missing_space[0]}", missing_space[1]
        problems.append(Problem(tuple(fields()), problem(source, tree, rule, cure)))
        return {}
    sections = {field.section for field in fields().values()}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "about":
            continue
        if key not in sections:
            _read_key(str(key), value, None, source, values, problems, notices)
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                _read_key(str(name), inner, key, source, values, problems, notices)
        elif value is not None:
            rule = "is a section, whose fields must be indented below it"
            cure = "Indent them, or write fields without a section"
            if missing_space := _missing_space(str(value)):
                rule, cure = f"{rule}: {missing_space[0]}", missing_space[1]
            # All fields of the section are named, so that none of them is reported as missing too.
            about_it = tuple(name for name, field in fields().items() if field.section == key)
            problems.append(Problem(about_it, problem(f"{source}: {key}", value, rule, cure)))
    # A whole config that was written before bias_gelu_fusion was a field.
    if values.get("openai_gelu") is False and "bias_gelu_fusion" not in values:
        values["bias_gelu_fusion"] = False
        notices.append(f"{source} has openai_gelu: false and no bias_gelu_fusion: GELU is the exact one (erf)")
    return values


def about(text: str) -> dict[str, Any]:
    """The mapping under `about` in a YAML text; {} where there is none, or the text cannot be read."""
    import yaml

    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    found = tree.get("about") if isinstance(tree, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def _read_key(
    name: str,
    value: Any,
    section: str | None,
    source: str,
    values: dict[str, Any],
    problems: list[Problem],
    notices: list[str],
) -> None:
    """Take one key of a YAML file: a field, or an old spelling of one."""
    field, called = fields().get(name), f"{source}: {name}"
    if field is not None and section in (None, field.section):
        if name in values:
            problems.append(Problem((name,), problem(called, value, "must be given once, not twice", "Keep one")))
        values[name] = value
    elif field is not None:
        cure = f"Move it there, or give {flag(name)}"
        text = problem(called, section, f"must be in the section {field.section}", cure)
        problems.append(Problem((name,), text))
    elif flag(name) in flags.config_flags():
        words = value if isinstance(value, list) else [] if value is True else [value]
        off = value is False or value is None
        old = flags.read([] if off else [flag(name), *map(str, words)], ())
        values |= old.values
        problems += old.problems
        notices += [f"{source}: {line}" for line in old.notices]
    elif missing_space := _missing_space(name):
        reason, cure = missing_space
        text = problem(f"A key of {source}", Words(name), f"must be a name: {reason}", cure)
        problems.append(Problem((name.partition(":")[0],), text))
    else:
        otherwise = "megalith pretrain --help lists the fields as flags"
        sections = dict.fromkeys(field.section for field in fields().values()) if section is None else ()
        near = unknown("key", name, [*sections, *fields()], otherwise)
        meant = tuple(
            key
            for key, field in fields().items()
            if near.endswith((f"did you mean {key}?", f"did you mean {field.section}?"))
        )
        problems.append(Problem(meant, f"{source}: {near}"))


REASONS = (  # words of the parser's message -> what is wrong, in the words of who writes the file, and the cure
    (
        "mapping values are not allowed",
        "a line has one name and one value",
        "Put text with a colon into quotes, or correct the indentation",
    ),
    ("could not find expected ':'", "a line is `name: value`", "Write a colon and a space after the name"),
    ("expected ',' or", "a bracket is not closed", "Close it"),
    ("but got '<stream end>'", "a bracket is not closed", "Close it"),
    ("unexpected end of stream", "a quotation mark is not closed", "Close it"),
    ("expected <block end>", "the fields of a section begin in one column", "Correct the indentation"),
    ("cannot start any token", "text that begins with such a sign must be in quotes", "Put it into quotes"),
    ("is given twice", "a name may appear only once in a section", "Keep one"),
    (
        "constructor for the tag",
        "values are numbers, text, true, false and lists, without tags (!)",
        "Leave the tag out",
    ),
)


def _invalid(source: str, text: str, error: Any) -> str:
    """What is wrong with a YAML text: the line, what stands there, the rule and the cure."""
    mark = getattr(error, "problem_mark", None)
    message = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    if mark is None:  # a character that YAML does not allow
        found = getattr(error, "character", "")
        found = chr(found) if isinstance(found, int) else found
        number = text[: getattr(error, "position", 0)].count("\n") + 1
        first_line = message.partition("\n")[0]
        rule = f"is not valid YAML in line {number}: {first_line}"
        return problem(source, found, rule, "Remove the character")
    lines = text.split("\n")
    number = min(mark.line, len(lines) - 1)
    while number and not lines[number].strip():  # the end of the file: the mistake is before it
        number -= 1
    line = lines[number]
    reason, cure = next(
        ((reason, cure) for words, reason, cure in REASONS if words in message), (message, "Correct the line")
    )
    # Where a space is missing, the parser complains of a line after it.
    earlier = [(at, found) for at in range(number + 1) if (found := _missing_space(lines[at]))]
    if earlier:
        number, (reason, cure) = earlier[-1]
        line = lines[number]
    elif message.endswith("is given twice"):
        reason = f"{message}, and {reason}"
    tabs = [at for at, each in enumerate(lines[: number + 1]) if "\t" in each[: len(each) - len(each.lstrip())]]
    if tabs or "'\\t'" in message:
        number = tabs[-1] if tabs else number
        line, reason, cure = lines[number], "YAML indents by spaces, not by tabs", "Replace the tabs by spaces"
    return problem(source, line.rstrip(), f"is not valid YAML in line {number + 1}: {reason}", cure)


def _loader() -> Any:
    """A YAML loader that refuses a key given twice, where yaml.SafeLoader silently keeps the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            names = [key.value for key, _ in node.value]
            for number, (key, _) in enumerate(node.value):
                if key.value in names[:number]:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            return super().construct_mapping(node, deep)

    return Loader
