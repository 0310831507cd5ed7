"""Adam's state in Megatron's files: which number of which list belongs to which parameter.

Megatron keeps no names. Its optimizer numbers the parameters of a rank in the order of the modules, those that decay before
those that do not (biases and everything one-dimensional). The distributed optimizer lays them into one flat buffer, the
last module first. Every shape is compared, and of flat buffers a sample of the weights, so that a wrong order is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megalith.checkpoint.formats.megatron.assemble import WEIGHTS_ALONE, by_rank
from megalith.checkpoint.formats.megatron.replicas import Replicas
from megalith.checkpoint.formats.megatron.source import Rank
from megalith.checkpoint.formats.megatron.vocabulary import NOTHING
from megalith.checkpoint.tensors import unpickle
from megalith.checkpoint.tensors.lazy import Lazy, cat
from megalith.checkpoint.tensors.stored import Window
from megalith.common.errors import CheckpointError, problem

MOMENTS = ("exp_avg", "exp_avg_sq")
ROWS = 8  # of a parameter, that are compared at each end
MASTERS = ("fp32_from_fp16_params", "fp32_from_fp16")
Table = dict[str, Lazy]  # {Megatron's name: tensor} of one tensor-parallel rank


def decays(name: str, shape: Sequence[int]) -> bool:
    """Whether Megatron decays a parameter."""
    return not name.endswith("bias") and len(shape) != 1


def order(chunks: Sequence[Mapping[str, Lazy]]) -> list[list[str]]:
    """Parameters of a rank in the order of its optimizer: the groups that are not empty."""
    names = [(name, tensor.shape) for chunk in chunks for name, tensor in chunk.items()]
    groups = [[name for name, shape in names if decays(name, shape) is wanted] for wanted in (True, False)]
    return [group for group in groups if group]


def read(ranks: Sequence[Rank], notes: list[str], replicas: Replicas) -> dict[str, list[Table]]:
    """{"exp_avg", "exp_avg_sq", and where they are kept apart from the weights "master": [the table of each tensor-parallel rank]}.

    Raises CheckpointError where a rank has no state, or one whose order cannot be known.
    """
    tables: dict[str, list[tuple[int, str, Table]]] = {}
    for rank in ranks:
        for key, table in _of_rank(rank).items():
            tables.setdefault(key, []).append((rank.tensor, rank.name, table))
    notes.append("optimizer: " + (", ".join(sorted(tables)) + " of every parameter" + NOTHING))
    return {key: by_rank(table, replicas, f"optimizer/{key}/") for key, table in tables.items()}


def _of_rank(rank: Rank) -> dict[str, Table]:
    outer = _only(rank.content.get("optimizer"))
    if "distrib_optim.pt" in rank.others:
        return _flat(rank, rank.others["distrib_optim.pt"])
    shards = [rank.others[name] for name in sorted(rank.others, key=_shard_number) if name.startswith("optim.pt/")]
    if shards:
        return _shards(rank, shards)
    if not isinstance(outer, dict):
        raise CheckpointError(
            problem(f"{rank.name}, optimizer", None, "it was saved without (--no-save-optim, a release)", WEIGHTS_ALONE)
        )
    inner = outer.get("optimizer", outer.get("optimizer_state_dict", outer))
    if not (isinstance(inner, dict) and inner.get("state") and inner.get("param_groups")):
        raise CheckpointError(
            problem(f"{rank.name}, optimizer", sorted(map(str, outer)), "Adam's state is under `state`", WEIGHTS_ALONE)
        )
    names = _numbered(rank, inner)
    found: dict[str, Table] = {
        key: {name: _moment(rank, inner["state"], number, key, name) for number, name in names.items()}
        for key in MOMENTS
    }
    masters = next((outer[key] for key in MASTERS if key in outer), None)
    if masters is not None:
        flat = [tensor for group in masters for tensor in group]
        if len(flat) != len(names):
            raise _disagree(rank, f"{len(flat)} float32 copies", f"the rank has {len(names)} parameters")
        found["master"] = dict(zip(names.values(), flat, strict=True))
    shapes = rank.tensors
    for key, table in found.items():
        for name, tensor in table.items():
            if tensor.shape != shapes[name].shape:
                raise _disagree(
                    rank, f"{key} {list(tensor.shape)} where {name} is", f"that has {list(shapes[name].shape)}"
                )
    return found


def _only(optimizer: Any) -> Any:
    """The optimizer of a chain of one, as Megatron core may have it."""
    return optimizer[0] if isinstance(optimizer, list) and len(optimizer) == 1 else optimizer


def _numbered(rank: Rank, inner: Mapping[str, Any]) -> dict[int, str]:
    """{number in the optimizer: parameter}, checked group by group."""
    groups, expected = [list(group["params"]) for group in inner["param_groups"]], order(rank.chunks)
    if [len(group) for group in groups] != [len(group) for group in expected]:
        raise _disagree(
            rank,
            f"groups of {[len(group) for group in groups]} parameters",
            f"the model has {[len(group) for group in expected]}",
        )
    return {
        number: name
        for group, names in zip(groups, expected, strict=True)
        for number, name in zip(group, names, strict=True)
    }


def _moment(rank: Rank, state: Mapping[Any, Any], number: int, key: str, name: str) -> Lazy:
    found = state.get(number, {}).get(key)
    if not isinstance(found, Lazy):
        raise CheckpointError(
            problem(
                f"{rank.name}, optimizer",
                None,
                f"{key} of {name} is not there (only Adam's state is read)",
                WEIGHTS_ALONE,
            )
        )
    return found


def _disagree(rank: Rank, found: str, rule: str) -> CheckpointError:
    return CheckpointError(
        problem(
            f"{rank.name}, optimizer", found, f"{rule}: the order of its parameters is not the one known", WEIGHTS_ALONE
        )
    )


def buffer(chunk: Mapping[str, Lazy]) -> list[tuple[str, int, int]]:
    """(parameter, first element, number of elements) in the flat buffer of the distributed optimizer: the last parameter first."""
    places, first = [], 0
    for name in reversed(list(chunk)):
        count = math.prod(chunk[name].shape)
        places.append((name, first, count))
        first += count
    return places


def _flat(rank: Rank, file: Window) -> dict[str, Table]:
    """Of distrib_optim.pt (NVIDIA since May 2023): flat tensors over the whole buffer of a chunk."""
    content, _ = unpickle.load(file)
    found: dict[str, Table] = {}
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
                    str(file), sorted(map(str, states if isinstance(states, dict) else by_type or {}))[:6],
                    f"only one buffer of at least {total} elements under param, exp_avg and exp_avg_sq can be read (the buckets of later "
                    "versions depend on settings that are not stored)",
                    "Save it once more with --ckpt-format torch_dist, or import without the optimizer",
                )
            )  # fmt: skip
        for theirs, ours in keys.items():
            whole = states[theirs]  # type: ignore[index]
            table = found.setdefault(ours, {})
            for name, first, count in buffer(chunk):
                table[name] = whole.narrow(0, first, count).reshape(chunk[name].shape)
    _compare(rank, found["master"], file)
    return found


def _shards(rank: Rank, files: Sequence[Window]) -> dict[str, Table]:
    """Of the optim.pt files of 2022, one of each data-parallel rank: it owns an equal range of each chunk's padded buffer."""
    pieces: dict[str, dict[str, list[Lazy]]] = {}
    for number, file in enumerate(files):
        content, _ = unpickle.load(file)
        outer = content.get("optimizer", {}) if isinstance(content, dict) else {}
        inner = outer.get("optimizer", {})
        masters = outer.get("shard_fp32_from_float16_groups") or []
        owned: list[tuple[str, int]] = []
        for chunk in rank.chunks:
            places = {name: (first, count) for name, first, count in buffer(chunk)}
            size = -(-sum(count for _, count in places.values()) // len(files))
            for name in chunk:  # in the order of the modules
                first, count = places[name]
                length = min(first + count, (number + 1) * size) - max(first, number * size)
                if length > 0:
                    owned.append((name, length))
        shapes = rank.tensors
        groups = [
            [(name, n) for name, n in owned if decays(name, shapes[name].shape) is wanted] for wanted in (True, False)
        ]
        expected = [pair for group in groups for pair in group]
        numbers = [each for group in inner.get("param_groups", []) for each in group["params"]]
        flat = [tensor for group in masters for tensor in group]
        if len(numbers) != len(expected) or len(flat) != len(expected):
            raise _disagree(rank, f"{len(numbers)} shards in {file}", f"this rank of {len(files)} owns {len(expected)}")
        for index, (name, length) in enumerate(expected):
            states = {key: _moment(rank, inner["state"], numbers[index], key, name) for key in MOMENTS} | {
                "master": flat[index]
            }
            for key, tensor in states.items():
                if math.prod(tensor.shape) != length:
                    raise _disagree(
                        rank, f"{key} of {math.prod(tensor.shape)} elements in {file}", f"{name} has {length} there"
                    )
                pieces.setdefault(key, {}).setdefault(name, []).append(tensor)
    shapes = rank.tensors
    found = {
        key: {name: _glued(parts, shapes[name].shape) for name, parts in table.items()}
        for key, table in pieces.items()
    }  # fmt: skip
    _compare(rank, found["master"], files[0])
    return found


def _glued(parts: Sequence[Lazy], shape: Sequence[int]) -> Lazy:
    return cat([part.reshape((math.prod(part.shape),)) for part in parts]).reshape(shape)


def _shard_number(name: str) -> int:
    return int(name.partition("/")[2]) if name.startswith("optim.pt/") else -1


def _compare(rank: Rank, masters: Table, file: Window) -> None:
    """The float32 copies must round to the weights: the first and last rows of a few of them are compared."""
    weights = rank.tensors
    for name in [*list(masters)[:3], *list(masters)[-3:]]:
        for rows in ((slice(0, ROWS),), (slice(-ROWS, None),)):
            mine, copy = weights[name].part(rows), masters[name].part(rows)
            if not torch.equal(mine, copy.to(mine.dtype)):
                rule = "its float32 copy is not the weight: the buffer is in an order that is not known here"
                raise CheckpointError(problem(str(file), name, rule, WEIGHTS_ALONE))


def steps(content: Mapping[str, Any], names: Sequence[str]) -> dict[str, Lazy]:
    """{optimizer/step/<parameter>: how often Adam updated it}; the iteration where the optimizer does not say."""
    outer = _only(content.get("optimizer"))
    inner = _only(outer.get("optimizer", outer)) if isinstance(outer, dict) else {}
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


SCHEDULE = {  # of Megatron's OptimizerParamScheduler -> ours (optim/schedule.py); lengths are in samples on both sides
    "max_lr": "lr", "min_lr": "min_lr", "lr_warmup_steps": "warmup_samples", "lr_decay_steps": "decay_samples",
    "lr_decay_style": "lr_decay_style", "start_wd": "start_weight_decay", "end_wd": "end_weight_decay",
    "wd_incr_style": "weight_decay_incr_style", "wd_incr_steps": "weight_decay_samples",
}  # fmt: skip
OLDER = {"start_lr": "max_lr", "warmup_iter": "lr_warmup_steps", "warmup_steps": "lr_warmup_steps", "end_iter": "lr_decay_steps",
         "decay_steps": "lr_decay_steps", "decay_style": "lr_decay_style", "num_iters": "num_steps"}  # fmt: skip


def train_state(content: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule and the loss scale, for a run that goes on."""
    theirs = content.get("opt_param_scheduler", content.get("lr_scheduler"))
    theirs = {OLDER.get(name, name): value for name, value in theirs.items()} if isinstance(theirs, dict) else {}
    outer = _only(content.get("optimizer"))
    scaler = outer.get("grad_scaler") if isinstance(outer, dict) else None
    state: dict[str, Any] = {
        "loss_scale": _scale(scaler),
        "schedule": {ours: theirs[name] for name, ours in SCHEDULE.items() if name in theirs},
    }
    if isinstance(theirs.get("num_steps"), int):
        state["scheduled_samples"] = theirs["num_steps"]
    return state


def _scale(scaler: Any) -> dict[str, Any]:
    if not isinstance(scaler, dict) or "scale" not in scaler:
        return {"scale": 1.0}
    scale = scaler["scale"].read() if isinstance(scaler["scale"], Lazy) else scaler["scale"]
    trackers = {
        name: int(scaler[name])
        for name in ("growth_tracker", "hysteresis_tracker")
        if isinstance(scaler.get(name), int)
    }
    return {"scale": float(scale.reshape(-1)[0] if isinstance(scale, Tensor) else scale)} | trackers
