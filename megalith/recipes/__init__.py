"""Complete runs as YAML files, by name.

Under `about` each says what it is, where its shape comes from, the size published for it and the number of processes it
runs on.
"""

from __future__ import annotations

import pathlib

from megalith.config.flags import yaml_text as yaml_reader
from megalith.config.flags.text import choose

FOLDER = pathlib.Path(__file__).parent


def names() -> list[str]:
    """Names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def text(name: str) -> str:
    """The YAML text of a recipe. Raises ConfigError naming the nearest where there is none of this name."""
    return (FOLDER / f"{choose('recipe', name, names())}.yaml").read_text(encoding="utf-8")


def about(yaml_text: str) -> dict:
    """The `about` of a recipe: summary, source, published (parameters as its source says), processes, vocab_size and
    parameters.
    """
    return yaml_reader.about(yaml_text)
