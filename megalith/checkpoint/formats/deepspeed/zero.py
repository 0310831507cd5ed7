"""The optimizer of DeepSpeed: ZeRO 1 and 2 shards, put together; and universal checkpoints.

ZeRO lays the parameters of a group one after another into a flat buffer, in the order of `param_shapes`, pads its end, and
gives each data-parallel rank an equal range. So a parameter is the pieces of some neighbouring files.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.megatron.assemble import WEIGHTS_ALONE, by_rank
from megalith.checkpoint.formats.megatron.optimizer import MOMENTS
from megalith.checkpoint.formats.megatron.replicas import Replicas
from megalith.checkpoint.tensors import unpickle
from megalith.checkpoint.tensors.lazy import Lazy, cat
from megalith.checkpoint.tensors.stored import Window
from megalith.common.errors import CheckpointError, problem

SHARD = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
FLAT = "single_partition_of_fp32_groups"
UNIVERSAL = {"fp32": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
Tables = dict[str, list[dict[str, Lazy]]]


def shards(
    folder: pathlib.Path,
    contents: Mapping[int, Mapping[str, Any]],
    names: Mapping[str, str],
    ranks: int,
    classes: set[str],
    replicas: Replicas,
) -> Tables:
    """{"exp_avg", "exp_avg_sq", "master": [the tensors of each tensor-parallel rank]}.

    replicas: gets the copies of what several pipeline stages have.
    contents: the model states of each model-parallel rank, for their param_shapes. names: DeepSpeed's name -> Megatron's.
    """
    files: dict[int, dict[int, pathlib.Path]] = {}
    for each in sorted(folder.iterdir()):
        if match := SHARD.fullmatch(each.name):
            files.setdefault(int(match[2]), {})[int(match[1])] = each
    if not files:
        raise CheckpointError(
            problem(f"{folder}, optimizer", None, "there are no zero_pp_rank_*_optim_states.pt", WEIGHTS_ALONE)
        )
    tables: dict[str, list[tuple[int, str, dict[str, Lazy]]]] = {
        key: [(rank, "", {}) for rank in range(ranks)] for key in ("master", *MOMENTS)
    }
    for number, mine in files.items():
        if sorted(mine) != list(range(len(mine))):
            rule = "data-parallel ranks are counted from 0 without a gap"
            raise CheckpointError(
                problem(f"{folder}, optimizer of mp_rank_{number:02d}", sorted(mine), rule, "Copy the missing files")
            )
        states = [_load(mine[place], classes) for place in range(len(mine))]
        count = states[0].get("partition_count", len(mine))
        count = count if isinstance(count, int) else max(count)
        if count != len(mine):
            rule = f"the files say that there are {count}"
            raise CheckpointError(
                problem(
                    f"{folder}, optimizer shards of mp_rank_{number:02d}", len(mine), rule, "Copy the missing files"
                )
            )
        shapes = contents.get(number, {}).get("param_shapes")
        if not shapes:
            rule = "model states list the parameters of each group under it"
            raise CheckpointError(problem(f"{folder}, param_shapes of mp_rank_{number:02d}", None, rule, WEIGHTS_ALONE))
        for index, group in enumerate(shapes):
            flat = {"master": [_partition(state, index) for state in states]} | {
                key: [_moment(state, index, key) for state in states] for key in MOMENTS
            }
            for key, parts in flat.items():
                table = {_known(name, names): tensor for name, tensor in _cut(folder, parts, group).items()}
                tables[key].append((number % ranks, f"mp_rank_{number:02d}", table))
    return {key: by_rank(table, replicas, f"optimizer/{key}/") for key, table in tables.items()}


def _partition(state: Mapping[str, Any], index: int) -> Lazy:
    groups = state.get(FLAT)
    if not isinstance(groups, list) or index >= len(groups):
        rule = f"ZeRO 1 and 2 keep {FLAT}; parameters cut by ZeRO 3 are not read"
        raise CheckpointError(
            problem("DeepSpeed's optimizer", sorted(map(str, state)), rule, "Save it with ZeRO 1 or 2, or as universal")
        )
    return groups[index]


def _moment(state: Mapping[str, Any], index: int, key: str) -> Lazy:
    base = state.get("base_optimizer_state")
    held = (
        base[index]
        if isinstance(base, list)
        else base.get("state", {}).get(index, {})
        if isinstance(base, dict)
        else {}
    )
    held = held.get("state", held) if isinstance(held, dict) else {}
    found = held.get(key, held.get(0, {}).get(key) if isinstance(held.get(0), dict) else None)
    if not isinstance(found, Lazy):
        raise CheckpointError(
            problem(
                "DeepSpeed's optimizer",
                None,
                f"{key} of group {index} is not there (only Adam's state is read)",
                WEIGHTS_ALONE,
            )
        )
    return found


def _cut(folder: pathlib.Path, parts: list[Lazy], shapes: Mapping[str, Any]) -> dict[str, Lazy]:
    """The parameters of a group from the ranges of its ranks."""
    bounds = [0]
    for part in parts:
        bounds.append(bounds[-1] + math.prod(part.shape))
    found, first = {}, 0
    for name, size in shapes.items():
        shape = tuple(size)
        last = first + math.prod(shape)
        pieces = []
        for part, begin, end in zip(parts, bounds, bounds[1:], strict=False):
            low, high = max(first, begin), min(last, end)
            if low < high:
                pieces.append(part.reshape((end - begin,)).narrow(0, low - begin, high - low))
        if last > bounds[-1]:
            rule = f"{name} ends at {last}"
            raise CheckpointError(
                problem(f"{folder}, elements of the optimizer's shards", bounds[-1], rule, "Copy the missing files")
            )
        found[name] = cat(pieces).reshape(shape)
        first = last
    return found


def _known(name: str, names: Mapping[str, str]) -> str:
    plain = re.sub(r"^(module\.)+", "", name)
    if plain not in names:
        rule = "param_shapes and the model's files name the same parameters"
        raise CheckpointError(problem("parameter of DeepSpeed's optimizer", name, rule, WEIGHTS_ALONE))
    return names[plain]


def universal(folder: pathlib.Path, names: Mapping[str, str], classes: set[str]) -> Tables:
    """As `shards`, of a universal checkpoint: each parameter whole in a folder of its own."""
    tables: Tables = {key: [{}] for key in UNIVERSAL.values()}
    for place in sorted(each for each in folder.iterdir() if each.is_dir()):
        for file, key in UNIVERSAL.items():
            content, found = unpickle.load(Window.of(place / f"{file}.pt"))
            classes.update(found)
            tensor = content.get("param") if isinstance(content, dict) else content
            if not isinstance(tensor, Lazy):
                raise CheckpointError(
                    problem(
                        str(place / f"{file}.pt"), type(content).__name__, "it holds one tensor", "Convert it again"
                    )
                )
            tables[key][0][_known(place.name, names)] = tensor
    return tables


def _load(file: pathlib.Path, classes: set[str]) -> dict[str, Any]:
    content, found = unpickle.load(Window.of(file))
    classes.update(found)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(problem(str(file), None, "DeepSpeed keeps optimizer_state_dict in it", "Copy it again"))
    return state
