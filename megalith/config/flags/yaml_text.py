"""YAML text to raw values by field: grouped by section or flat, old spellings too, every mistake named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import ConfigError, problem
from megalith.config.flags import flags
from megalith.config.flags.text import Problem, Words, flag, unknown
from megalith.config.flags.values import fields

GLUED = re.compile(r"\s*(?:- )?(\w+):([^\s/\\:]\S*)")  # `name:value`, which YAML takes for one word


def _glued(found: str) -> tuple[str, str] | None:
    """(rule, cure) where what stands there begins with a name, a colon and no blank, and the name is one that we know."""
    match = GLUED.match(found)
    names = {*fields(), *(field.section for field in fields().values())}
    if match is None or match[1] not in names:
        return None
    return (
        f"{match[1]}:{match[2]} has no space after the colon, so that YAML reads one word",
        f"Write {match[1]}: {match[2]}",
    )


def load_yaml(text: str, source: str) -> Any:
    """What a YAML text holds; ConfigError with line, rule and cure where it is none, or names a thing twice."""
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
        plain = (
            "it maps names to values, as in 'model:' and below it '  num_layers: 4'",
            "Correct the file; megalith config writes one",
        )
        problems.append(Problem(tuple(fields()), problem(source, tree, *(_glued(str(tree)) or plain))))
        return {}
    sections = {field.section for field in fields().values()}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "about":
            continue
        if key not in sections:
            _one(str(key), value, None, source, values, problems, notices)
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                _one(str(name), inner, key, source, values, problems, notices)
        elif value is not None:
            plain = (
                f"{key} is a section: its fields stand below it, indented",
                "Indent them, or write fields without a section",
            )
            about_it = tuple(
                name for name, field in fields().items() if field.section == key
            )  # what it should set is not missing as well
            problems.append(Problem(about_it, problem(f"{source}: {key}", value, *(_glued(str(value)) or plain))))
    if (
        values.get("openai_gelu") is False and "bias_gelu_fusion" not in values
    ):  # a whole config from before the latter was a field
        values["bias_gelu_fusion"] = False
        notices.append(f"{source} has openai_gelu: false and no bias_gelu_fusion: GELU is the exact one (erf)")
    return values


def about(text: str) -> dict[str, Any]:
    """What a YAML text says of itself under `about`; {} where it says nothing, or cannot be read."""
    import yaml

    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    said = tree.get("about") if isinstance(tree, Mapping) else None
    return dict(said) if isinstance(said, Mapping) else {}


def _one(
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
            problems.append(Problem((name,), problem(called, value, "it is given twice", "Keep one")))
        values[name] = value
    elif field is not None:
        problems.append(
            Problem(
                (name,),
                problem(called, section, f"{name} belongs to {field.section}", f"Move it there, or give {flag(name)}"),
            )
        )
    elif flag(name) in flags.config_flags():
        off = value is False or value is None
        old = flags.read(
            []
            if off
            else [flag(name), *map(str, value if isinstance(value, list) else [] if value is True else [value])],
            (),
        )
        values |= old.values
        problems += old.problems
        notices += [f"{source}: {told}" for told in old.notices]
    elif glued := _glued(name):
        problems.append(Problem((name.partition(":")[0],), problem(f"{source}: key", Words(name), *glued)))
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


RULES = (  # words of the parser's complaint -> the rule and the cure, in the words of who writes the file
    (
        "mapping values are not allowed",
        "a line has one name and one value",
        "Put text with a colon into quotes, or correct the indentation",
    ),
    ("could not find expected ':'", "a line is `name: value`", "Write a colon and a blank after the name"),
    ("expected ',' or", "a bracket is not closed", "Close it"),
    ("but got '<stream end>'", "a bracket is not closed", "Close it"),
    ("unexpected end of stream", "a quotation mark is not closed", "Close it"),
    ("expected <block end>", "the fields of a section begin in one column", "Correct the indentation"),
    ("cannot start any token", "text that begins with such a sign stands in quotes", "Put it into quotes"),
    ("is given twice", "a name stands once in a section", "Keep one"),
    (
        "constructor for the tag",
        "values are numbers, text, true, false and lists, without tags (!)",
        "Leave the tag out",
    ),
)


def _invalid(source: str, text: str, error: Any) -> str:
    """What is wrong with a YAML text: the line, what stands there, the rule and the cure."""
    mark, said = (
        getattr(error, "problem_mark", None),
        str(getattr(error, "problem", None) or getattr(error, "reason", None) or error),
    )
    if mark is None:  # a character that YAML does not allow
        found = getattr(error, "character", "")
        found = chr(found) if isinstance(found, int) else found
        number = text[: getattr(error, "position", 0)].count("\n") + 1
        return problem(
            f"{source} is not valid YAML, line {number}", found, said.partition("\n")[0], "Remove the character"
        )
    lines = text.split("\n")
    number = min(mark.line, len(lines) - 1)
    while number and not lines[number].strip():  # the end of the file: what is wrong stands before it
        number -= 1
    line = lines[number]
    rule, cure = next(((rule, cure) for words, rule, cure in RULES if words in said), (said, "Correct the line"))
    earlier = [
        (at, found) for at in range(number + 1) if (found := _glued(lines[at]))
    ]  # the parser complains of a line after it
    if earlier:
        number, (rule, cure) = earlier[-1]
        line = lines[number]
    elif said.endswith("is given twice"):
        rule, cure = f"{said}, and {rule}", cure
    tabs = [at for at, each in enumerate(lines[: number + 1]) if "\t" in each[: len(each) - len(each.lstrip())]]
    if tabs or "'\\t'" in said:
        number = tabs[-1] if tabs else number
        line, rule, cure = lines[number], "YAML indents by blanks, not by tabs", "Replace the tabs by blanks"
    return problem(f"{source} is not valid YAML, line {number + 1}", line.rstrip(), rule, cure)


def _loader() -> Any:
    """A YAML loader that refuses a key given twice, where the plain one silently keeps the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            names = [key.value for key, _ in node.value]
            for number, (key, _) in enumerate(node.value):
                if key.value in names[:number]:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            return super().construct_mapping(node, deep)

    return Loader
