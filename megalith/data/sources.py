"""Which files a run reads and in what shares: the forms of --data-path, and the `weight path corpus` list."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from megalith.common.errors import ConfigError, DataError, problem


@dataclasses.dataclass(frozen=True)
class Source:
    """One indexed dataset: its prefix, its weight (None: in proportion to its size) and the corpus it belongs to, if any."""

    prefix: str
    weight: float | None = None
    corpus: str = ""


def sources_of(paths: Sequence[str], flag: str = "--data-path") -> list[Source]:
    """Sources named by one prefix, one directory (all in it, in proportion to size), `weight prefix ...` pairs, or plain prefixes."""
    items = [str(path) for path in paths]
    if len(items) == 1 and os.path.isdir(items[0]):
        found = sorted(path.with_suffix("") for path in pathlib.Path(items[0]).glob("*.idx"))
        if not found:
            raise DataError(problem(flag, items[0], "the directory has no .idx file", "Name a directory of indexed datasets, or a prefix"))
        return [Source(str(path)) for path in found]
    weights = [_number(item) for item in items[::2]]
    if len(items) % 2 or all(weight is None for weight in weights):
        return [Source(item) for item in items]
    if None in weights:
        wrong = items[2 * weights.index(None)]
        raise ConfigError(problem(flag, wrong, "a weight stands before each prefix, or before none", f"Write {flag} 0.3 first 0.7 second"))
    return _used([Source(prefix, weight) for weight, prefix in zip(weights, items[1::2])], flag)


def read_list(path: str | os.PathLike) -> list[Source]:
    """The sources of a file with a line `weight path corpus` each; relative paths are relative to the file. DataError names the line."""
    folder = pathlib.Path(path).absolute().parent
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data-file-list {path} cannot be read: {error}") from error
    sources = []
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        weight = _number(fields[0])
        if len(fields) != 3 or weight is None:
            raise DataError(problem(f"{path}, line {number}", line.strip(), "a line is `weight path corpus`", "Correct the line"))
        sources.append(Source(str(folder / fields[1].split(".bin")[0]), weight, fields[2]))
    if not sources:
        raise DataError(f"--data-file-list {path} names no dataset; each line is `weight path corpus`")
    return _used(sources, f"--data-file-list {path}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _used(sources: list[Source], where: str) -> list[Source]:
    """The sources with a weight above 0; negative and infinite ones are refused."""
    for source in sources:
        if source.weight is not None and not 0 <= source.weight < float("inf"):
            raise ConfigError(problem(f"{where}, weight of {source.prefix}", source.weight, "weights are 0 or more", "Correct the weight"))
    used = [source for source in sources if source.weight != 0]
    if not used:
        raise ConfigError(problem(where, 0, "at least one weight is above 0", "Raise a weight"))
    return used
