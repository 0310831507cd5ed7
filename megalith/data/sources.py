"""Which files a run reads and with what weights: the forms of --data-path, and the `weight path corpus` list."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words
from megalith.config.sections.data import DataConfig
from megalith.data.indexed import is_folder


@dataclasses.dataclass(frozen=True)
class Source:
    """One indexed dataset: its prefix, its weight (None: in proportion to its size) and its corpus, if any."""

    prefix: str
    weight: float | None = None
    corpus: str = ""


def split_sources(data: DataConfig) -> tuple[dict[str, list[Source]], bool]:
    """The sources of training, validation and test, and whether --split divides the documents of one list among them.

    Of a blend whose weights change during the run, training has those of weight 0 too.
    """
    keep_unused = data.data_weights_schedule is not None
    paths = {name: getattr(data, f"{name}_data_path") for name in ("train", "valid", "test")}
    if any(paths.values()):
        return {
            name: parse_data_path(path, f"--{name}-data-path", keep_unused and name == "train") if path else []
            for name, path in paths.items()
        }, False
    if data.data_file_list:
        sources = read_file_list(data.data_file_list, keep_unused)
    else:
        sources = parse_data_path(data.data_path, keep_unused=keep_unused)
    return dict.fromkeys(paths, sources), True


def parse_data_path(paths: Sequence[str], flag: str = "--data-path", keep_unused: bool = False) -> list[Source]:
    """Sources named by one prefix, one directory, `weight prefix ...` pairs, or prefixes alone.

    Those of a directory, and prefixes alone, have weights in proportion to size. keep_unused: also those of weight 0.
    """
    items = [str(path) for path in paths]
    if len(items) == 1 and is_folder(items[0]):
        found = sorted(path.with_suffix("") for path in pathlib.Path(items[0]).glob("[!.]*.idx"))
        if not found:
            rule = "must name a directory with .idx files, or a prefix"
            raise DataError(problem(flag, items[0], rule, "Name a directory of indexed datasets, or a prefix"))
        return [Source(str(path)) for path in found]
    return parse_weighted(items, flag, keep_unused)


def parse_weighted(items: Sequence[str], flag: str, keep_unused: bool = False) -> list[Source]:
    """Sources named by `weight prefix ...` pairs, or by prefixes alone. keep_unused: also those of weight 0."""
    weights = [_number(item) for item in items[::2]]
    if len(items) % 2 or all(weight is None for weight in weights):
        return [Source(item) for item in items]
    if None in weights:
        wrong = items[2 * weights.index(None)]
        rule = "must have a weight before each prefix, or before none"
        raise ConfigError(problem(flag, Words(f"{wrong!r} for a weight"), rule, f"Write {flag} 0.3 first 0.7 second"))
    return _used([Source(prefix, weight) for weight, prefix in zip(weights, items[1::2])], flag, keep_unused)


def read_file_list(path: str | os.PathLike, keep_unused: bool = False) -> list[Source]:
    """The sources of a file with a line `weight path corpus` each; relative paths are relative to the file.

    Paths may hold spaces, corpora may not. keep_unused: also sources of weight 0. DataError names the line.
    """
    folder = pathlib.Path(path).absolute().parent
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data-file-list {path} cannot be read: {error}") from error
    sources = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        first, *rest = line.split(maxsplit=1)
        fields, weight = "".join(rest).rsplit(maxsplit=1), _number(first)
        if len(fields) != 2 or weight is None:
            rule = "must be `weight path corpus`"
            raise DataError(problem(f"{path}, line {number},", line.strip(), rule, "Correct the line"))
        sources.append(Source(str(folder / fields[0].removesuffix(".bin")), weight, fields[1]))
    if not sources:
        raise DataError(f"--data-file-list {path} names no dataset; each line is `weight path corpus`")
    return _used(sources, f"--data-file-list {path}", keep_unused)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _used(sources: list[Source], where: str, keep_unused: bool) -> list[Source]:
    """The sources with a weight above 0; with keep_unused also corpora in which no source has one.

    Weights have a finite sum above 0.
    """
    for source in sources:
        if source.weight is not None and not 0 <= source.weight < float("inf"):
            what, rule = f"{where}, weight of {source.prefix},", "must be finite, 0 or more"
            raise ConfigError(problem(what, source.weight, rule, "Correct the weight"))
    used = [source for source in sources if source.weight != 0]
    total = sum(source.weight or 0.0 for source in used)
    if not 0 < total < float("inf"):
        what, rule = f"{where}: the sum of the weights", "must be finite and above 0"
        raise ConfigError(problem(what, total, rule, "Give at least one finite weight above 0"))
    alive = {source.corpus for source in used} - {""} if keep_unused else {source.corpus for source in sources}
    return [source for source in sources if source.weight != 0 or source.corpus not in alive]
