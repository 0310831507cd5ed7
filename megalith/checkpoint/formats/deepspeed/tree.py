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
from typing import Any, NamedTuple

from megalith.checkpoint.formats import Format, Options
from megalith.checkpoint.formats.deepspeed import neox, zero
from megalith.checkpoint.formats.megatron import build
from megalith.checkpoint.formats.megatron.agreement import same_iteration, without_gap
from megalith.checkpoint.formats.megatron.arguments import known
from megalith.checkpoint.formats.megatron.assemble import by_rank
from megalith.checkpoint.formats.megatron.names import normal
from megalith.checkpoint.formats.megatron.replicas import Replicas
from megalith.checkpoint.formats.megatron.source import Rank, chunks_of, flatten, number_layers
from megalith.checkpoint.tensors import unpickle
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.tensors.stored import Window
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, problem

LATEST = "latest"
STATES = re.compile(r"mp_rank_(\d+)_model_states\.pt")
LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
SEQUENTIAL = re.compile(r"(?:module\.)*sequential\.(\d+)\.")
ATTENTION = re.compile(r"(^|\.)(self_)?attention\.")


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
        raise CheckpointError(
            problem(f"{path}", there, rule, "Name one with --ckpt-step N, or name its folder as SOURCE")
        )
    classes: set[str] = set()
    files = {int(match[1]): each for each in sorted(folder.iterdir()) if (match := STATES.fullmatch(each.name))}
    contents = {number: _load(file, classes) for number, file in files.items()}
    content = contents[min(contents)]
    layers = sorted(each for each in folder.iterdir() if LAYER.fullmatch(each.name))
    notes = same_iteration(folder.name, content)
    modules = _modules(layers, contents, classes)
    if neox.recognises(content, modules):
        content = {**content, "args": neox.arguments(folder, content, modules, options, notes)}
        modules = [each._replace(tensors=neox.parameters(each.tensors)) for each in modules]
    if modules:
        names, tables = pipelined(modules, counted=bool(unpickle.fields(content.get("args")).get("num_layers")))
        ranks = max(each.rank for each in modules) + 1
    else:
        ranks = len(files)
        holders = [Rank(files[number].name, number, 0, each, chunks_of(each)) for number, each in contents.items()]
        for holder in holders:
            number_layers([holder])
        tables = [(holder.tensor, holder.name, holder.tensors) for holder in holders]
        names = {name: normal(name) for name in flatten(content.get("module"))}
    said = known(unpickle.fields(content.get("args"))).get("tensor_model_parallel_size") or ranks
    present = sorted({rank for rank, _, _ in tables})
    if present != list(range(max(int(said), ranks))):
        rule = f"tensor parallel {max(int(said), ranks)} has a file for each rank"
        raise CheckpointError(problem(f"{folder}, tensor-parallel ranks", present, rule, "Copy the missing files"))
    replicas = Replicas(options.replicas, {files[number].name: each for number, each in contents.items()})
    parts = by_rank(tables, replicas)

    def states(more: list[str]) -> build.States:
        if (folder / "zero").is_dir():
            return zero.universal(folder / "zero", names, classes)
        return zero.shards(folder, contents, names, len(parts), classes, replicas)

    version = build.version_of(content, 3.0)
    return build.weights_of(content, version, parts, states, classes, options, replicas, notes)


class Module(NamedTuple):
    """What a tensor-parallel rank has of one module of the pipeline. prefix: of its names in the optimizer, before the number."""

    where: str
    number: int
    rank: int
    tensors: dict[str, Lazy]
    prefix: str = ""


def _modules(layers: list[pathlib.Path], contents: Mapping[int, Mapping[str, Any]], classes: set[str]) -> list[Module]:
    """The modules of a pipeline: in a file each, or all in the model states of a NeoX that was not pipelined; [] of other models."""
    places = {file: match for file in layers if (match := LAYER.fullmatch(file.name))}
    found = [
        Module(file.name, int(match[1]), int(match[2]), flatten(_load(file, classes))) for file, match in places.items()
    ]
    found = [each for each in found if each.tensors]
    for rank, content in contents.items() if not layers else ():
        several: dict[int, dict[str, Lazy]] = {}
        for name, tensor in flatten(content.get("module")).items():
            if match := SEQUENTIAL.match(name):
                several.setdefault(int(match[1]), {})[name[match.end() :]] = tensor
        states = f"mp_rank_{rank:02d}_model_states.pt"
        found += [
            Module(f"{states}, {number}", number, rank, tensors, "sequential.") for number, tensors in several.items()
        ]
    return found


def pipelined(modules: list[Module], counted: bool) -> tuple[dict[str, str], list[tuple[int, str, dict[str, Lazy]]]]:
    """({pipeline's name of a parameter: Megatron's}, [(tensor-parallel rank, where, tensors)]) of the modules of a pipeline.

    A module's number depends on the version (some count a module without parameters), so it is known by what it holds.
    counted: whether arguments say how many layers there are, so that it need not be told from numbers.
    """
    names: dict[str, str] = {}
    numbers = sorted({each.number for each in modules if any(ATTENTION.search(name) for name in each.tensors)})
    without_gap("modules of the pipeline with layers, layer_NN-model_*", numbers, first=-1)
    places = {number: place for place, number in enumerate(numbers)}
    if numbers and not any(each.number < numbers[0] for each in modules):
        rule = f"the embedding comes before the layers, which begin with {numbers[0]}"
        raise CheckpointError(
            problem("first module, layer_NN-model_*", numbers[0], rule, "Copy the checkpoint again, whole")
        )
    if numbers and not counted:
        _beside({each.number for each in modules}, numbers)
    tables = []
    for where, number, rank, tensors, prefix in sorted(modules, key=lambda each: (each.rank, each.number)):
        table = {}
        for name, tensor in tensors.items():
            theirs = _place(name, places.get(number))
            table[theirs] = tensor
            names[name if name.startswith("tied_modules.") else f"{prefix}{number}.{name}"] = theirs
            if theirs.startswith("embedding."):
                names.setdefault(f"tied_modules.embed.{name}", theirs)
        tables.append((rank, where, table))
    return names, tables


def _beside(modules: set[int], layers: list[int]) -> None:
    """Raise CheckpointError where more than one module without parameters lies between the layers and what is around them."""
    before, after = [n for n in modules if n < layers[0]], [n for n in modules if n > layers[-1]]
    ends = [(max(before), layers[0])] if before else []
    for low, high in [*ends, *([(layers[-1], min(after))] if after else [])]:
        if high - low > 2:
            found = f"none from {low + 1} to {high - 1}"
            rule = "between the layers and the modules around them is one without parameters at most"
            raise CheckpointError(
                problem("modules of the pipeline, layer_NN-model_*", found, rule, "Copy the checkpoint again, whole")
            )


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
        raise CheckpointError(
            problem(str(file), type(content).__name__, "DeepSpeed's files hold a dict", "Copy it again")
        )
    return dict(content)


FORMAT = Format(
    "deepspeed: mp_rank_00_model_states.pt in a folder, or in the global_stepN that `latest` names", recognises, read
)
