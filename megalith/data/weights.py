"""The list `weight path corpus` of a directory of datasets, with the number of epochs for each corpus."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from collections.abc import Mapping

from megalith.common.errors import DataError, problem
from megalith.common.files import write_text
from megalith.config.flags.text import Words
from megalith.data.indexed.inspecting import describe, prefixes_below

LEVEL = re.compile(r"_[^_]+_(document|sentence)$")


@dataclasses.dataclass(frozen=True)
class MixtureEntry:
    """A corpus in the mixture. proportion: of all tokens read, between 0 and 1."""

    corpus: str
    files: int
    tokens: int
    epochs: float
    proportion: float


def corpus_of(prefix: str) -> str:
    """The corpus of a dataset: its name up to the first `-`, without `_text_document`.

    wiki-0003_text_document -> wiki.
    """
    return LEVEL.sub("", os.path.basename(prefix)).partition("-")[0]


def write_weights(
    directory: str, output: str, epochs: Mapping[str, float] | None = None, by_directory: bool = False
) -> list[MixtureEntry]:
    """Write a line `weight path corpus` for every dataset below `directory`; return the corpora, largest first.

    Within a corpus, files weigh as their tokens; corpora weigh as their tokens times `epochs` (all 1 without it:
    proportional to size; the key `default` stands for corpora not named). by_directory: a corpus is a subdirectory, not
    the beginning of a name. Paths are relative to the list, so that both can move together. Weights sum to 1. Raises
    DataError for epochs that name no corpus.
    """
    tokens: dict[str, int] = {}
    for prefix in prefixes_below(directory):
        tokens[prefix] = describe(prefix)["total_num_tokens"]
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for prefix in tokens:
        groups[os.path.basename(os.path.dirname(prefix)) if by_directory else corpus_of(prefix)].append(prefix)
    spaced = [corpus for corpus in groups if len(corpus.split()) != 1]
    if spaced:
        rule = "must have a name without spaces, because a line of the list is `weight path corpus`"
        cure = "Rename its files, or with --by-directory its folder"
        raise DataError(problem(f"Corpus of {groups[spaced[0]][0]}", spaced[0], rule, cure))
    factors = _epochs(epochs, list(groups))
    sizes = {corpus: sum(tokens[prefix] for prefix in listed) for corpus, listed in groups.items()}
    total = sum(sizes[corpus] * factors[corpus] for corpus in groups)
    if not total:
        rule, found = "must hold tokens for a mixture", Words("0 tokens after multiplication by --epochs")
        raise DataError(problem(directory, found, rule, "Check the datasets and the epochs"))
    base = os.path.dirname(os.path.abspath(output))
    lines = [
        f"{tokens[prefix] * factors[corpus] / total:.10g} {os.path.relpath(os.path.abspath(prefix), base)} {corpus}"
        for corpus, listed in sorted(groups.items())
        for prefix in listed
        if tokens[prefix] * factors[corpus]
    ]
    write_text(output, "\n".join(lines) + "\n")
    entries = [
        MixtureEntry(name, len(groups[name]), sizes[name], factors[name], sizes[name] * factors[name] / total)
        for name in groups
    ]
    return sorted(entries, key=lambda entry: (-entry.proportion, entry.corpus))


def _epochs(requested: Mapping[str, float] | None, corpora: list[str]) -> dict[str, float]:
    if requested is None:
        return dict.fromkeys(corpora, 1.0)
    requested = {str(name): value for name, value in requested.items()}  # YAML reads a corpus called 2020 as a number
    problems = []
    for name, value in requested.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
            rule = "must be a number, 0 or more"
            problems.append(problem(f"Epochs of {name!r}", value, rule, "Correct the YAML file"))
        if name not in corpora and name != "default":
            rule = f"must name the corpora of the directory ({', '.join(sorted(corpora))})"
            problems.append(problem("epochs", name, rule, "Correct the name"))
    missing = [name for name in corpora if name not in requested and "default" not in requested]
    if missing:
        found = Words(f"nothing for {', '.join(sorted(missing))}")
        problems.append(problem("epochs", found, "must name every corpus", "Add them, or `default: 1`"))
    if problems:
        raise DataError("\n".join(problems))
    return {name: float(requested.get(name, requested.get("default", 1.0))) for name in corpora}
