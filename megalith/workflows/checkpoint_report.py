"""What a checkpoint holds, as facts and as a page; what does not fit it; whether its files are intact."""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from megalith.checkpoint.store import fit, folder, manifest
from megalith.checkpoint.store.facts import describe, part_of, read_config, read_train_state
from megalith.common import units
from megalith.common.errors import CheckpointError, ConfigError, problem


def inspect(path: str, iteration: int | None = None, other: str | None = None) -> dict[str, Any]:
    """The facts of a checkpoint, or of weights in another format.

    other: another checkpoint or a config file to compare with; the facts then have "differences", lines of text.
    """
    if not folder.is_megalith(path) and folder.describe_foreign(path) and not other:
        return _of_another_program(path, iteration)
    found = folder.find(path, iteration)
    facts = describe(found) | {"config": read_config(found), "train_state": read_train_state(found)}
    if other:
        facts["differences"] = _compare(found, pathlib.Path(other))
    return facts


def _of_another_program(path: str, iteration: int | None) -> dict[str, Any]:
    """The facts of weights in another format, as read here: the model's whole tensors by canonical names, a config."""
    from megalith.checkpoint import formats  # here, because these import torch
    from megalith.checkpoint.formats import sources
    from megalith.checkpoint.formats.megatron.source import describe_layout
    from megalith.config.flags.loading import to_yaml

    source = sources.local(path)
    format = formats.recognise(source)
    weights = formats.read(source, format, {"iteration": iteration, "replicas": "first"})
    tensors: dict[str, dict[str, Any]] = {
        name: {"shape": list(each.shape), "dtype": str(each.dtype).removeprefix("torch.")}
        for name, each in weights.tensors.items()
    }
    parameters: dict[str, int] = {}
    for name, each in tensors.items():
        parameters[part_of(name)] = parameters.get(part_of(name), 0) + math.prod(each["shape"])
    return {
        "path": str(path),
        "iteration": weights.iteration,
        "format": format,
        "layout": describe_layout(source) if format == "megatron" else "",
        "parameters": parameters,
        "tensors": tensors,
        "train_state": dict(weights.train_state),
        "config": to_yaml(weights.config, changed_only=True),
        "notes": list(weights.notes),
    }


def verify(path: str) -> dict[str, list[str]]:
    """{path: problems} of one checkpoint, or of all in a folder; every file is read and its checksum compared.

    Raises CheckpointError where there is no checkpoint.
    """
    given = pathlib.Path(path)
    paths = [given] if (given / manifest.NAME).exists() else folder.checkpoint_paths(given)
    if not paths:
        missing = f"no checkpoint found; it would be a folder such as {folder.folder_name(100)} in it. Check the path."
        raise CheckpointError(folder.describe_foreign(given) or folder.describe_runs(given) or f"{given}: {missing}")
    return {str(each): manifest.verify(each) for each in paths}


def verification_lines(found: dict[str, list[str]]) -> Iterator[str]:
    """What `verify` found, as lines of text."""
    for path, problems in found.items():
        if problems:
            yield from problems
        else:
            facts = describe(path)
            yield f"{path}: complete ({len(facts['files'])} files, {units.size(facts['bytes'])})"


def parse_renames(texts: list[str]) -> dict[str, str]:
    """{old: new} of texts OLD=NEW. Raises ConfigError for one that is none."""
    pairs = [text.partition("=") for text in texts]
    wrong = [old for old, equals, new in pairs if not (old and equals and new)]
    if wrong:
        raise ConfigError(
            problem("--rename", wrong[0], "must be OLD=NEW, such as head=output", "Write --rename OLD=NEW")
        )
    return {old: new for old, _, new in pairs}


def _compare(path: pathlib.Path, other: pathlib.Path) -> list[str]:
    """What keeps a run of `other` (a checkpoint, or a config file) from using `path`, and the flags that cure it."""
    here = fit.model_section(read_config(path))
    if other.is_file():
        is_checkpoint = (other.parent / manifest.NAME).exists()
        there = fit.model_section(other.read_text(encoding="utf-8"), vocab_size_as_flag=not is_checkpoint)
        if not there:
            raise ConfigError(f"--with: {other} cannot be read as a config; `megalith config` writes one")
        lines = []
    else:
        second = folder.find(other)
        there = fit.model_section(read_config(second))
        shapes, others = (
            {name: facts["shape"] for name, facts in manifest.read(each)["tensors"].items()} for each in (path, second)
        )
        lines = fit.differences(others, shapes, here)
    settings = [
        f"{field}: {value} here, {other_value} there -> {fit.cure(field, here)}"
        for field, value, other_value in fit.config_differences(here, there)
    ]
    return settings + lines


def page(facts: dict[str, Any]) -> list[str]:
    """The facts as lines of text."""
    if "format" in facts:
        origin = [f"format      {facts['format']}" + f", {facts['layout']}" * bool(facts["layout"])]
        origin += [f"note        {note}" for note in facts["notes"]]
    else:
        writer = facts["written_by"]
        versions = f"megalith {writer['megalith']}, torch {writer['torch']}, ranks: {writer['ranks']}"
        origin = [
            f"written by  {versions}; schema {facts['schema']}",
            f"size        {units.size(facts['bytes'])} in {len(facts['files'])} files",
        ]
    lines = [
        f"checkpoint  {facts['path']}",
        f"iteration   {facts['iteration']}",
        *origin,
        "parameters",
        *(f"  {part:<28} {number:>16,}  ({units.count(number)})" for part, number in facts["parameters"].items()),
        f"tensors     {len(facts['tensors'])}",
        *_tree(facts["tensors"]),
        "train state",
        *(f"  {line}" for line in json.dumps(facts["train_state"], indent=1).splitlines()[1:-1]),
        "config",
        *(f"  {line}" for line in facts["config"].splitlines()),
    ]
    if "differences" in facts:
        lines += [
            "differences" if facts["differences"] else "differences: none",
            *(f"  {line}" for line in facts["differences"]),
        ]
    return lines


def _tree(tensors: dict[str, dict]) -> list[str]:
    """Names by part; layers that are alike are on one line."""
    lines: dict[tuple[str, str, str], list[int]] = {}
    for name, facts in tensors.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        pattern = name.replace(layer[0], "layers.*.", 1) if layer else name
        key = part_of(name), pattern, f"{facts['shape']} {facts['dtype']}"
        lines.setdefault(key, []).append(int(layer[1]) if layer else -1)
    text, last_part = [], None
    for (part, pattern, kind), numbers in lines.items():
        text += [f"  {part}"] if part != last_part else []
        last_part = part
        label = pattern.removeprefix(f"{part}/").replace(".*.", f".{format_numbers(numbers)}.")
        text.append(f"    {label:<44} {kind}")
    return text


def format_numbers(numbers: list[int]) -> str:
    """[0, 1, 2] -> 0-2; [0, 2] -> 0,2; [1] -> 1."""
    consecutive = len(numbers) > 1 and sorted(numbers) == list(range(min(numbers), max(numbers) + 1))
    return f"{min(numbers)}-{max(numbers)}" if consecutive else ",".join(map(str, sorted(numbers)))
