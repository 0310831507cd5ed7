"""What the verbs of `megalith data` have in common: prefixes, checks of outputs, descriptions of datasets."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from megalith.common import units
from megalith.common.errors import ConfigError, DataError, problem


def expand_prefixes(paths: Iterable[str], output_prefix: str) -> list[str]:
    """The datasets that paths name, those of a folder sorted by name. Raises DataError where one is the output."""
    from megalith.data.indexed import is_folder, resolve_prefix
    from megalith.data.indexed.merge import directory_prefixes

    found = [directory_prefixes(path, output_prefix) if is_folder(path) else [resolve_prefix(path)] for path in paths]
    return [prefix for prefixes in found for prefix in prefixes]


def check_output_prefix(prefix: str) -> str:
    """The prefix. Raises DataError where it ends as a file or a folder does."""
    stem = prefix.removesuffix(".bin").removesuffix(".idx")
    if stem != prefix or not os.path.basename(prefix):
        rule = "must be the beginning of file names, to which .bin and .idx are added"
        cure = f"Write {stem if os.path.basename(stem) else os.path.join(stem, 'NAME')}"
        raise DataError(problem("--output-prefix", prefix, rule, cure))
    return prefix


def read_epochs(path: str) -> dict[str, Any]:
    """The `corpus: epochs` lines of a YAML file. Raises DataError for a file that cannot be read as such."""
    from megalith.config.flags.yaml_text import load_yaml

    try:
        epochs = load_yaml(pathlib.Path(path).read_text(encoding="utf-8"), f"--epochs {path}")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(problem("--epochs", path, f"must be a readable file ({why})", "Correct the path")) from error
    except ConfigError as error:  # what is wrong inside the file
        raise DataError(str(error)) from error
    if not isinstance(epochs, dict):
        raise DataError(problem("--epochs", path, "must hold lines `corpus: epochs`", "Correct the file"))
    return epochs


def describe_datasets(
    paths: Iterable[str], damaged: list[str], verify: bool = False, vocab_size: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(prefix, facts) of each dataset that the paths name; the errors of damaged ones are appended to `damaged`."""
    from megalith.data.indexed.inspecting import describe, prefixes_below
    from megalith.data.indexed.inspecting import verify as verify_dataset

    for prefix in (prefix for path in paths for prefix in prefixes_below(path)):
        try:
            facts = describe(prefix)
            if verify:
                facts |= verify_dataset(prefix, vocab_size)
        except DataError as error:
            damaged.append(str(error))
            continue
        yield prefix, facts


def page(facts: dict[str, Any], verified: bool) -> list[str]:
    """The facts of a dataset as lines of text."""
    size, sound = units.size(facts["size"]), ", sound" if verified else ""
    counts = f"{facts['num_documents']} documents, {facts['num_sequences']} sequences"
    return [
        f"{facts['data_prefix']}: {facts['format']}, {facts['dtype']}, {size}{sound}",
        f"  {counts}, {facts['total_num_tokens']} tokens",
        f"  sequences of {facts['shortest_sequence']} to {facts['longest_sequence']} tokens",
        *(f"  {name} {facts[name]}" for name in ("largest_token", "sha256.bin", "sha256.idx") if name in facts),
    ]
