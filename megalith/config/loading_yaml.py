"""YAML text to raw values by field: grouped by section or flat, old spellings too, every mistake named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.common.errors import problem
from megalith.config import flags
from megalith.config.loading_values import fields
from megalith.config.text import Problem, flag, unknown


def parse_yaml(text: str, source: str, problems: list[Problem], notices: list[str]) -> dict[str, Any]:
    """Raw values by field of a YAML text, its keys grouped by section or flat. A top-level `about` is for people."""
    import yaml  # here, because most commands and every --help do without it

    try:
        tree = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        problems.append(Problem(tuple(fields()), f"{source} is not valid YAML: {error}".replace("\n", " ")))
        return {}
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        rule = "it maps names to values, as in 'model:' and below it '  num_layers: 4'"
        problems.append(Problem(tuple(fields()), problem(source, tree, rule, "Correct the file; megalith config writes one")))
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
            rule = f"{key} is a section: its fields stand below it, indented"
            problems.append(Problem((), problem(f"{source}: {key}", value, rule, "Indent them, or write fields without a section")))
    if values.get("openai_gelu") is False and "bias_gelu_fusion" not in values:  # a whole config from before the latter was a field
        values["bias_gelu_fusion"] = False
        notices.append(f"{source} has openai_gelu: false and no bias_gelu_fusion: GELU is the exact one (erf)")
    return values


def _one(
    name: str, value: Any, section: str | None, source: str, values: dict[str, Any], problems: list[Problem], notices: list[str]
) -> None:
    """Take one key of a YAML file: a field, or an old spelling of one."""
    field, called = fields().get(name), f"{source}: {name}"
    if field is not None and section in (None, field.section):
        if name in values:
            problems.append(Problem((name,), problem(called, value, "it is given twice", "Keep one")))
        values[name] = value
    elif field is not None:
        problems.append(
            Problem((name,), problem(called, section, f"{name} belongs to {field.section}", f"Move it there, or give {flag(name)}"))
        )
    elif flag(name) in flags.config_flags():
        off = value is False or value is None
        old = flags.read([] if off else [flag(name), *map(str, value if isinstance(value, list) else [] if value is True else [value])], ())
        values |= old.values
        problems += old.problems
        notices += [f"{source}: {told}" for told in old.notices]
    else:
        otherwise = "megalith pretrain --help lists the fields as flags"
        near = unknown("key", name, fields(), otherwise)
        meant = tuple(key for key in fields() if near.endswith(f"did you mean {key}?"))
        problems.append(Problem(meant, f"{source}: {near}"))


def _loader() -> Any:
    """A YAML loader that refuses a key given twice, where the plain one silently keeps the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            names = [key.value for key, _ in node.value]
            for key, _ in node.value:
                if names.count(key.value) > 1:
                    raise yaml.YAMLError(f"{key.value} is given twice{key.start_mark}; keep one")
            return super().construct_mapping(node, deep)

    return Loader
