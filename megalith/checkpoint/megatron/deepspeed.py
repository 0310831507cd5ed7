"""Megatron-DeepSpeed's trees: module states, pipelined layer files, optimizer shards of ZeRO 1 and 2, universal checkpoints.

latest                                              text: the tag, global_step100
global_step100/mp_rank_00_model_states.pt           the model under `module` (without pipeline), param_shapes, args
global_step100/layer_03-model_00-model_states.pt    with pipeline: the parameters of one module of the pipeline
global_step100/[bf16_]zero_pp_rank_0_mp_rank_00_optim_states.pt
global_step100/zero/<parameter>/fp32.pt, exp_avg.pt, exp_avg_sq.pt      universal
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from megalith.checkpoint import unpickle
from megalith.checkpoint.formats import Format, Options
from megalith.checkpoint.lazy import Lazy
from megalith.checkpoint.megatron import build, zero
from megalith.checkpoint.megatron.arguments import known
from megalith.checkpoint.megatron.assemble import by_rank
from megalith.checkpoint.megatron.names import normal
from megalith.checkpoint.megatron.source import Rank, chunks_of, flatten, number_layers
from megalith.checkpoint.stored import Window
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, problem

LATEST = "latest"
STATES = re.compile(r"mp_rank_(\d+)_model_states\.pt")
LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")


def find(path: pathlib.Path, tag: int | None) -> pathlib.Path | None:
    """The folder of a checkpoint: `path` itself, or the one in it of iteration `tag` or that `latest` names; None where there is none."""
    if tag is None and any(STATES.fullmatch(each.name) for each in path.iterdir()):
        return path
    try:
        name = f"global_step{tag}" if tag is not None else (path / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    inner = path / pathlib.PurePath(name).name
    return inner if inner.is_dir() and any(STATES.fullmatch(each.name) for each in inner.iterdir()) else None


def recognises(path: pathlib.Path) -> bool:
    """Whether `path` is such a tree."""
    return path.is_dir() and find(path, None) is not None


def read(path: pathlib.Path, options: Options) -> Weights:
    """The weights at `path`. Raises CheckpointError for what is missing, damaged, unknown or does not fit."""
    folder = find(path, options.iteration)
    if folder is None:
        there = sorted(each.name for each in path.iterdir() if each.is_dir())[:8]
        rule = "a folder global_stepN with mp_rank_00_model_states.pt is there for each iteration"
        raise CheckpointError(problem(f"{path}", there, rule, "Name one with --ckpt-step N, or name its folder as SOURCE"))
    classes: set[str] = set()
    files = {int(match[1]): each for each in sorted(folder.iterdir()) if (match := STATES.fullmatch(each.name))}
    contents = {number: _load(file, classes) for number, file in files.items()}
    content = contents[min(contents)]
    layers = sorted(each for each in folder.iterdir() if LAYER.fullmatch(each.name))
    if layers:
        names, tables = pipelined(layers, classes)
        ranks = max(tables) + 1
    else:
        ranks = len(files)
        holders = [Rank(str(files[number]), number, 0, each, chunks_of(each)) for number, each in contents.items()]
        for holder in holders:
            number_layers([holder])
        tables = {holder.tensor: holder.tensors for holder in holders}
        names = {name: normal(name) for name in flatten(content.get("module"))}
    said = known(unpickle.fields(content.get("args"))).get("tensor_model_parallel_size") or ranks
    if sorted(tables) != list(range(max(int(said), ranks))):
        rule = f"tensor parallel {max(int(said), ranks)} has a file for each rank"
        raise CheckpointError(problem(f"{folder}, tensor-parallel ranks", sorted(tables), rule, "Copy the missing files"))
    parts = by_rank(sorted(tables.items()))

    def states(notes: list[str]) -> build.States:
        if (folder / "zero").is_dir():
            return zero.universal(folder / "zero", names, classes)
        return zero.shards(folder, contents, names, len(parts), classes)

    return build.weights_of(content, build.version_of(content, 3.0), parts, states, classes, options)


def pipelined(files: list[pathlib.Path], classes: set[str]) -> tuple[dict[str, str], dict[int, dict[str, Lazy]]]:
    """({pipeline's name of a parameter: Megatron's}, {tensor-parallel rank: tensors}) of layer files.

    A module's number depends on the version (some count a module without parameters), so a file is known by what it holds.
    """
    tables: dict[int, dict[str, Lazy]] = {}
    names: dict[str, str] = {}
    numbers: dict[int, int] = {}  # of a module -> of its layer
    loaded = []
    for file in files:
        match = LAYER.fullmatch(file.name)
        tensors = flatten(_load(file, classes))
        if match and tensors:
            loaded.append((int(match[1]), int(match[2]), tensors))
            if any("self_attention" in name or ".attention." in f".{name}" for name in tensors):
                numbers.setdefault(int(match[1]), len(numbers))
    for module, rank, tensors in loaded:
        table = tables.setdefault(rank, {})
        for name, tensor in tensors.items():
            theirs = _place(name, numbers.get(module))
            names[f"{module}.{name}"] = names[name if name.startswith("tied_modules.") else f"{module}.{name}"] = theirs
            names.setdefault(f"tied_modules.embed.{name}", theirs) if theirs.startswith("embedding.") else None
            table.setdefault(theirs, tensor)
    return names, tables


def _place(name: str, layer: int | None) -> str:
    """Megatron's name of a parameter in a module of the pipeline."""
    name = name.removeprefix("tied_modules.embed.")
    if layer is not None:
        return normal(f"encoder.layers.{layer}.{name}")
    if "embeddings." in name:
        return f"embedding.{name}"
    if name in ("lm_head.weight", "final_linear.weight"):
        return "output_layer.weight"
    return f"encoder.final_layernorm.{name.rpartition('.')[2]}"


def _load(file: pathlib.Path, classes: set[str]) -> dict[str, Any]:
    content, found = unpickle.load(Window.of(file))
    classes.update(found)
    if not isinstance(content, Mapping):
        raise CheckpointError(problem(str(file), type(content).__name__, "DeepSpeed's files hold a dict", "Copy it again"))
    return dict(content)


FORMAT = Format("deepspeed: mp_rank_00_model_states.pt in a folder, or in the global_stepN that `latest` names", recognises, read)
