"""The optimizer of DeepSpeed: shards of ZeRO 1 and 2, concatenated; and universal checkpoints.

ZeRO puts the parameters of a group one after another into a flat buffer, in the order of `param_shapes`, pads its end,
and gives each data-parallel rank an equal range. So a parameter may be spread over several consecutive files.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.megatron.assemble import WEIGHTS_ONLY_CURE, group_by_rank
from megalith.checkpoint.formats.megatron.optimizer import MOMENTS
from megalith.checkpoint.formats.megatron.replicas import Replicas
from megalith.checkpoint.tensors import unpickle
from megalith.checkpoint.tensors.lazy import Lazy, cat
from megalith.checkpoint.tensors.stored import Window
from megalith.common.errors import CheckpointError, problem
from megalith.config.flags.text import Words

SHARD_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
FLAT_GROUPS = "single_partition_of_fp32_groups"
UNIVERSAL = {"fp32": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
Tables = dict[str, list[dict[str, Lazy]]]


def read_shards(
    folder: pathlib.Path,
    contents: Mapping[int, Mapping[str, Any]],
    names: Mapping[str, str],
    ranks: int,
    classes: set[str],
    replicas: Replicas,
) -> Tables:
    """{"exp_avg", "exp_avg_sq", "master": [the tensors of each tensor-parallel rank]}.

    contents: the model states of each model-parallel rank, for their param_shapes. names: DeepSpeed's name ->
    Megatron's. replicas: gets the copies that several pipeline stages have.
    """
    files: dict[int, dict[int, pathlib.Path]] = {}
    for file in sorted(folder.iterdir()):
        if match := SHARD_FILE.fullmatch(file.name):
            files.setdefault(int(match[2]), {})[int(match[1])] = file
    if not files:
        rule = "must be saved in zero_pp_rank_*_optim_states.pt"
        raise CheckpointError(problem(f"The optimizer in {folder}", Words("nothing"), rule, WEIGHTS_ONLY_CURE))
    tables: dict[str, list[tuple[int, str, dict[str, Lazy]]]] = {
        key: [(rank, "", {}) for rank in range(ranks)] for key in ("master", *MOMENTS)
    }
    for number, rank_files in files.items():
        rank_name = f"mp_rank_{number:02d}"
        if sorted(rank_files) != list(range(len(rank_files))):
            what = f"the data-parallel ranks of the optimizer of {rank_name} in {folder}"
            rule = "must be numbered from 0 without a gap"
            raise CheckpointError(problem(what, sorted(rank_files), rule, "Copy the missing files"))
        states = [_load(rank_files[rank], classes) for rank in range(len(rank_files))]
        count = states[0].get("partition_count", len(rank_files))
        count = count if isinstance(count, int) else max(count)
        if count != len(rank_files):
            what, rule = f"the optimizer shards of {rank_name} in {folder}", f"must be {count}, as the files say"
            raise CheckpointError(problem(what, len(rank_files), rule, "Copy the missing files"))
        shapes = contents.get(number, {}).get("param_shapes")
        if not shapes:
            what, rule = f"param_shapes of {rank_name} in {folder}", "must list the parameters of each group"
            raise CheckpointError(problem(what, Words("nothing"), rule, WEIGHTS_ONLY_CURE))
        for index, group in enumerate(shapes):
            partitions = {"master": [_partition(state, index) for state in states]} | {
                key: [_moment(state, index, key) for state in states] for key in MOMENTS
            }
            for key, parts in partitions.items():
                tensors = _split_flat(folder, parts, group)
                table = {_megatron_name(name, names): tensor for name, tensor in tensors.items()}
                tables[key].append((number % ranks, rank_name, table))
    return {key: group_by_rank(table, replicas, f"optimizer/{key}/") for key, table in tables.items()}


def _partition(state: Mapping[str, Any], index: int) -> Lazy:
    groups = state.get(FLAT_GROUPS)
    if not isinstance(groups, list) or index >= len(groups):
        rule = f"must have {FLAT_GROUPS}, as with ZeRO 1 and 2 (parameters partitioned by ZeRO 3 are not read)"
        raise CheckpointError(
            problem("DeepSpeed's optimizer", sorted(map(str, state)), rule, "Save it with ZeRO 1 or 2, or as universal")
        )
    return groups[index]


def _moment(state: Mapping[str, Any], index: int, key: str) -> Lazy:
    base = state.get("base_optimizer_state")
    group = (
        base[index]
        if isinstance(base, list)
        else base.get("state", {}).get(index, {})
        if isinstance(base, dict)
        else {}
    )
    group = group.get("state", group) if isinstance(group, dict) else {}
    found = group.get(key, group.get(0, {}).get(key) if isinstance(group.get(0), dict) else None)
    if not isinstance(found, Lazy):
        rule = f"must hold {key} of group {index} (only Adam's state is read)"
        raise CheckpointError(problem("DeepSpeed's optimizer", Words("nothing"), rule, WEIGHTS_ONLY_CURE))
    return found


def _split_flat(folder: pathlib.Path, parts: list[Lazy], shapes: Mapping[str, Any]) -> dict[str, Lazy]:
    """The parameters of a group from the parts of its flat buffer that the ranks have."""
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
            what = f"The optimizer's shards in {folder}"
            rule = f"must hold at least {last} elements, because {name} ends there"
            raise CheckpointError(problem(what, bounds[-1], rule, "Copy the missing files"))
        found[name] = cat(pieces).reshape(shape)
        first = last
    return found


def _megatron_name(name: str, names: Mapping[str, str]) -> str:
    """Megatron's name of a parameter of DeepSpeed."""
    stripped = re.sub(r"^(module\.)+", "", name)
    if stripped not in names:
        what, rule = "every parameter of DeepSpeed's optimizer", "must be a parameter of the model's files"
        raise CheckpointError(problem(what, name, rule, WEIGHTS_ONLY_CURE))
    return names[stripped]


def read_universal(folder: pathlib.Path, names: Mapping[str, str], classes: set[str]) -> Tables:
    """As `read_shards`, for a universal checkpoint: each full parameter in its own folder."""
    tables: Tables = {key: [{}] for key in UNIVERSAL.values()}
    for parameter in sorted(each for each in folder.iterdir() if each.is_dir()):
        for stem, key in UNIVERSAL.items():
            file = parameter / f"{stem}.pt"
            content, found = unpickle.load(Window.of(file))
            classes.update(found)
            tensor = content.get("param") if isinstance(content, dict) else content
            if not isinstance(tensor, Lazy):
                found_type = Words(type(content).__name__)
                raise CheckpointError(problem(str(file), found_type, "must hold one tensor", "Convert it again"))
            tables[key][0][_megatron_name(parameter.name, names)] = tensor
    return tables


def _load(file: pathlib.Path, classes: set[str]) -> dict[str, Any]:
    content, found = unpickle.load(Window.of(file))
    classes.update(found)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        rule = "must hold optimizer_state_dict, as DeepSpeed saves it"
        raise CheckpointError(problem(str(file), Words("nothing"), rule, "Copy it again"))
    return state
