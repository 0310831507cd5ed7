"""Adam's state in Megatron's files: which number of which list belongs to which parameter.

Megatron stores no names. Its optimizer numbers the parameters of a rank in the order of the modules, those with weight
decay before those without (biases and everything one-dimensional). The distributed optimizer puts them into one flat
buffer, the last module first. Every shape is compared, and for flat buffers a sample of the weights, so that a wrong
order is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megalith.checkpoint.formats.megatron.assemble import WEIGHTS_ONLY_CURE, group_by_rank
from megalith.checkpoint.formats.megatron.replicas import Replicas
from megalith.checkpoint.formats.megatron.source import RankFile
from megalith.checkpoint.formats.megatron.vocabulary import NO_ACTION_NEEDED
from megalith.checkpoint.tensors import unpickle
from megalith.checkpoint.tensors.lazy import Lazy, cat
from megalith.checkpoint.tensors.stored import Window
from megalith.common.errors import CheckpointError, problem
from megalith.config.flags.text import Words

MOMENTS = ("exp_avg", "exp_avg_sq")
COMPARED_ROWS = 8  # how many first and how many last rows of a parameter are compared
MASTER_KEYS = ("fp32_from_fp16_params", "fp32_from_fp16")
NamedTensors = dict[str, Lazy]  # {Megatron's name: tensor} of one tensor-parallel rank


def has_weight_decay(name: str, shape: Sequence[int]) -> bool:
    """Whether Megatron decays a parameter."""
    return not name.endswith("bias") and len(shape) != 1


def parameter_order(chunks: Sequence[Mapping[str, Lazy]]) -> list[list[str]]:
    """The parameters of a rank in the order of its optimizer, by group, without empty groups."""
    names = [(name, tensor.shape) for chunk in chunks for name, tensor in chunk.items()]
    groups = [[name for name, shape in names if has_weight_decay(name, shape) is wanted] for wanted in (True, False)]
    return [group for group in groups if group]


def read(ranks: Sequence[RankFile], notes: list[str], replicas: Replicas) -> dict[str, list[NamedTensors]]:
    """{key: [the tensors of each tensor-parallel rank]} for the keys "exp_avg", "exp_avg_sq" and "master".

    "master", the float32 weights, is there where they are stored apart from the weights. Raises CheckpointError where a
    rank has no state, or a state whose order is unknown.
    """
    tables: dict[str, list[tuple[int, str, NamedTensors]]] = {}
    for rank in ranks:
        for key, table in _read_rank(rank).items():
            tables.setdefault(key, []).append((rank.tensor_rank, rank.name, table))
    notes.append("optimizer: " + (", ".join(sorted(tables)) + " of every parameter" + NO_ACTION_NEEDED))
    return {key: group_by_rank(table, replicas, f"optimizer/{key}/") for key, table in tables.items()}


def _read_rank(rank: RankFile) -> dict[str, NamedTensors]:
    outer = _unchained(rank.content.get("optimizer"))
    if "distrib_optim.pt" in rank.other_files:
        return _read_flat(rank, rank.other_files["distrib_optim.pt"])
    other_files = sorted(rank.other_files, key=_shard_number)
    shards = [rank.other_files[name] for name in other_files if name.startswith("optim.pt/")]
    if shards:
        return _read_shards(rank, shards)
    what = f"the optimizer in {rank.name}"
    if not isinstance(outer, dict):
        rule = "must be saved, but the checkpoint was saved without it (--no-save-optim, a release)"
        raise CheckpointError(problem(what, Words("nothing"), rule, WEIGHTS_ONLY_CURE))
    inner = outer.get("optimizer", outer.get("optimizer_state_dict", outer))
    if not (isinstance(inner, dict) and inner.get("state") and inner.get("param_groups")):
        rule = "must hold Adam's state under `state`"
        raise CheckpointError(problem(what, sorted(map(str, outer)), rule, WEIGHTS_ONLY_CURE))
    names = _parameter_numbers(rank, inner)
    found: dict[str, NamedTensors] = {
        key: {name: _moment(rank, inner["state"], number, key, name) for number, name in names.items()}
        for key in MOMENTS
    }
    masters = next((outer[key] for key in MASTER_KEYS if key in outer), None)
    if masters is not None:
        flat = [tensor for group in masters for tensor in group]
        if len(flat) != len(names):
            raise _unknown_order(rank, f"{len(flat)} float32 copies where the rank has {len(names)} parameters")
        found["master"] = dict(zip(names.values(), flat, strict=True))
    shapes = rank.tensors
    for key, table in found.items():
        for name, tensor in table.items():
            if tensor.shape != shapes[name].shape:
                expected = list(shapes[name].shape)
                raise _unknown_order(rank, f"{key} {list(tensor.shape)} where {name} is {expected}")
    return found


def _unchained(optimizer: Any) -> Any:
    """The optimizer in a ChainedOptimizer of one, as Megatron core may have it."""
    return optimizer[0] if isinstance(optimizer, list) and len(optimizer) == 1 else optimizer


def _parameter_numbers(rank: RankFile, inner: Mapping[str, Any]) -> dict[int, str]:
    """{number in the optimizer: parameter}, checked group by group."""
    groups, expected = [list(group["params"]) for group in inner["param_groups"]], parameter_order(rank.chunks)
    sizes, expected_sizes = [len(group) for group in groups], [len(group) for group in expected]
    if sizes != expected_sizes:
        raise _unknown_order(rank, f"groups of {sizes} parameters where the model has {expected_sizes}")
    return {
        number: name
        for group, names in zip(groups, expected, strict=True)
        for number, name in zip(group, names, strict=True)
    }


def _moment(rank: RankFile, state: Mapping[Any, Any], number: int, key: str, name: str) -> Lazy:
    found = state.get(number, {}).get(key)
    if not isinstance(found, Lazy):
        rule = f"must hold {key} of {name} (only Adam's state is read)"
        raise CheckpointError(problem(f"The optimizer in {rank.name}", Words("nothing"), rule, WEIGHTS_ONLY_CURE))
    return found


def _unknown_order(rank: RankFile, found: str) -> CheckpointError:
    rule = "must have its parameters in the known order"
    return CheckpointError(problem(f"The optimizer in {rank.name}", Words(found), rule, WEIGHTS_ONLY_CURE))


def flat_buffer(chunk: Mapping[str, Lazy]) -> list[tuple[str, int, int]]:
    """(parameter, first element, number of elements) in the flat buffer of the distributed optimizer.

    The last parameter comes first.
    """
    ranges, first = [], 0
    for name in reversed(list(chunk)):
        count = math.prod(chunk[name].shape)
        ranges.append((name, first, count))
        first += count
    return ranges


def _read_flat(rank: RankFile, file: Window) -> dict[str, NamedTensors]:
    """The state in distrib_optim.pt (NVIDIA since May 2023): one flat tensor over the buffer of each chunk."""
    content, _ = unpickle.load(file)
    found: dict[str, NamedTensors] = {}
    for number, chunk in enumerate(rank.chunks):
        by_type = content.get(number, content.get(str(number))) if isinstance(content, dict) else None
        states = next(iter(by_type.values())) if isinstance(by_type, dict) and len(by_type) == 1 else None
        total = sum(math.prod(tensor.shape) for tensor in chunk.values())
        keys = {"param": "master"} | {key: key for key in MOMENTS}
        flat = isinstance(states, dict) and all(
            isinstance(states.get(key), Lazy) and len(states[key].shape) == 1 for key in keys
        )
        if not flat or any(states[key].shape[0] < total for key in keys):  # type: ignore[index]
            raise CheckpointError(
                problem(
                    str(file),
                    sorted(map(str, states if isinstance(states, dict) else by_type or {}))[:6],
                    f"must hold one buffer of at least {total} elements under param, exp_avg and exp_avg_sq to be read "
                    "(the buckets of later versions depend on settings that are not stored)",
                    "Save it once more with --ckpt-format torch_dist, or import without the optimizer",
                )
            )
        for megatron_key, key in keys.items():
            buffer = states[megatron_key]  # type: ignore[index]
            table = found.setdefault(key, {})
            for name, first, count in flat_buffer(chunk):
                table[name] = buffer.narrow(0, first, count).reshape(chunk[name].shape)
    _check_master_weights(rank, found["master"], file)
    return found


def _read_shards(rank: RankFile, files: Sequence[Window]) -> dict[str, NamedTensors]:
    """The state in the optim.pt files of 2022, one of each data-parallel rank.

    A data-parallel rank owns an equal range of each chunk's padded buffer.
    """
    pieces: dict[str, dict[str, list[Lazy]]] = {}
    for number, file in enumerate(files):
        content, _ = unpickle.load(file)
        outer = content.get("optimizer", {}) if isinstance(content, dict) else {}
        inner = outer.get("optimizer", {})
        masters = outer.get("shard_fp32_from_float16_groups") or []
        owned: list[tuple[str, int]] = []
        for chunk in rank.chunks:
            ranges = {name: (first, count) for name, first, count in flat_buffer(chunk)}
            size = -(-sum(count for _, count in ranges.values()) // len(files))
            for name in chunk:  # in the order of the modules
                first, count = ranges[name]
                length = min(first + count, (number + 1) * size) - max(first, number * size)
                if length > 0:
                    owned.append((name, length))
        shapes = rank.tensors
        groups = [
            [(name, n) for name, n in owned if has_weight_decay(name, shapes[name].shape) is wanted]
            for wanted in (True, False)
        ]
        expected = [pair for group in groups for pair in group]
        numbers = [each for group in inner.get("param_groups", []) for each in group["params"]]
        flat = [tensor for group in masters for tensor in group]
        if len(numbers) != len(expected) or len(flat) != len(expected):
            owner = f"this data-parallel rank of {len(files)} owns {len(expected)}"
            raise _unknown_order(rank, f"{len(numbers)} shards in {file} where {owner}")
        for index, (name, length) in enumerate(expected):
            states = {key: _moment(rank, inner["state"], numbers[index], key, name) for key in MOMENTS} | {
                "master": flat[index]
            }
            for key, tensor in states.items():
                if math.prod(tensor.shape) != length:
                    count = math.prod(tensor.shape)
                    raise _unknown_order(rank, f"{key} of {count} elements in {file} where {name} has {length}")
                pieces.setdefault(key, {}).setdefault(name, []).append(tensor)
    shapes = rank.tensors
    found = {
        key: {name: _concatenate(parts, shapes[name].shape) for name, parts in table.items()}
        for key, table in pieces.items()
    }
    _check_master_weights(rank, found["master"], files[0])
    return found


def _concatenate(parts: Sequence[Lazy], shape: Sequence[int]) -> Lazy:
    return cat([part.reshape((math.prod(part.shape),)) for part in parts]).reshape(shape)


def _shard_number(name: str) -> int:
    return int(name.partition("/")[2]) if name.startswith("optim.pt/") else -1


def _check_master_weights(rank: RankFile, masters: NamedTensors, file: Window) -> None:
    """Check that the float32 copies round to the weights, on the first and last rows of a few of them."""
    weights = rank.tensors
    for name in [*list(masters)[:3], *list(masters)[-3:]]:
        for rows in ((slice(0, COMPARED_ROWS),), (slice(-COMPARED_ROWS, None),)):
            weight, copy = weights[name].part(rows), masters[name].part(rows)
            if not torch.equal(weight, copy.to(weight.dtype)):
                rule = "must hold float32 copies that round to the weights, in the known order"
                found = Words(f"other values for {name}")
                raise CheckpointError(problem(str(file), found, rule, WEIGHTS_ONLY_CURE))


def step_counts(content: Mapping[str, Any], names: Sequence[str]) -> dict[str, Lazy]:
    """{optimizer/step/<parameter>: its number of updates}; the iteration where the optimizer does not store it."""
    outer = _unchained(content.get("optimizer"))
    inner = _unchained(outer.get("optimizer", outer)) if isinstance(outer, dict) else {}
    inner = inner if isinstance(inner, dict) else {}
    found: Any = None
    for holder in [*inner.get("param_groups", []), *list(inner.get("state", {}).values())[:1]]:
        found = holder.get("step", found) if isinstance(holder, dict) else found
    if isinstance(found, Lazy):
        found = float(found.read())
    count = float(found if isinstance(found, (int, float)) else content.get("iteration", 0))
    return {
        f"optimizer/step/{name}": Lazy(shape=(), dtype=torch.float32, read=lambda: torch.tensor(count))
        for name in names
    }


SCHEDULE = {  # Megatron's OptimizerParamScheduler -> megalith's (optim/schedule.py); both have lengths in samples
    "max_lr": "lr", "min_lr": "min_lr", "lr_warmup_steps": "warmup_samples", "lr_decay_steps": "decay_samples",
    "lr_decay_style": "lr_decay_style", "start_wd": "start_weight_decay", "end_wd": "end_weight_decay",
    "wd_incr_style": "weight_decay_incr_style", "wd_incr_steps": "weight_decay_samples",
}  # fmt: skip
OLD_SCHEDULE_NAMES = {
    "start_lr": "max_lr", "warmup_iter": "lr_warmup_steps", "warmup_steps": "lr_warmup_steps",
    "end_iter": "lr_decay_steps", "decay_steps": "lr_decay_steps", "decay_style": "lr_decay_style",
    "num_iters": "num_steps",
}  # fmt: skip


def train_state(content: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule and the loss scale, for a run that resumes."""
    stored = content.get("opt_param_scheduler", content.get("lr_scheduler"))
    stored = stored if isinstance(stored, dict) else {}
    scheduler = {OLD_SCHEDULE_NAMES.get(name, name): value for name, value in stored.items()}
    outer = _unchained(content.get("optimizer"))
    scaler = outer.get("grad_scaler") if isinstance(outer, dict) else None
    state: dict[str, Any] = {
        "loss_scale": _loss_scale(scaler),
        "schedule": {
            name: scheduler[megatron_name] for megatron_name, name in SCHEDULE.items() if megatron_name in scheduler
        },
    }
    if isinstance(scheduler.get("num_steps"), int):
        state["scheduled_samples"] = scheduler["num_steps"]
    return state


def _loss_scale(scaler: Any) -> dict[str, Any]:
    if not isinstance(scaler, dict) or "scale" not in scaler:
        return {"scale": 1.0}
    scale = scaler["scale"].read() if isinstance(scaler["scale"], Lazy) else scaler["scale"]
    trackers = {
        name: int(scaler[name])
        for name in ("growth_tracker", "hysteresis_tracker")
        if isinstance(scaler.get(name), int)
    }
    return {"scale": float(scale.reshape(-1)[0] if isinstance(scale, Tensor) else scale)} | trackers
