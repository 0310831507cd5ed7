"""Folders of Megatron-DeepSpeed: model states, layer files of a pipeline, ZeRO 1 and 2 shards, universal checkpoints.

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

from megalith.checkpoint.formats import DeepSpeedOptions, Format
from megalith.checkpoint.formats.deepspeed import neox, zero
from megalith.checkpoint.formats.megatron import build
from megalith.checkpoint.formats.megatron.agreement import check_consecutive, iteration_notes
from megalith.checkpoint.formats.megatron.arguments import check_arguments
from megalith.checkpoint.formats.megatron.assemble import group_by_rank
from megalith.checkpoint.formats.megatron.names import normalize_name
from megalith.checkpoint.formats.megatron.replicas import Replicas
from megalith.checkpoint.formats.megatron.source import RankFile, flatten, model_chunks, renumber_layers
from megalith.checkpoint.tensors import unpickle
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.tensors.stored import Window
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, problem
from megalith.config.flags.text import Words

LATEST = "latest"
MODEL_STATES_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
SEQUENTIAL = re.compile(r"(?:module\.)*sequential\.(\d+)\.")
ATTENTION = re.compile(r"(^|\.)(self_)?attention\.")


def find(path: pathlib.Path, tag: int | None) -> pathlib.Path | None:
    """The folder of a checkpoint: `path`, or in it that of iteration `tag` or the one that `latest` names.

    None where there is none.
    """
    if tag is None and _has_model_states(path):
        return path
    try:
        name = f"global_step{tag}" if tag is not None else (path / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    inner = path / pathlib.PurePath(name).name
    return inner if inner.is_dir() and _has_model_states(inner) else None


def _has_model_states(folder: pathlib.Path) -> bool:
    return any(MODEL_STATES_FILE.fullmatch(file.name) for file in folder.iterdir())


def recognises(path: pathlib.Path) -> bool:
    """Whether `path` is such a folder."""
    return path.is_dir() and find(path, None) is not None


def read(path: pathlib.Path, options: DeepSpeedOptions) -> Weights:
    """The weights at `path`. Raises CheckpointError for what is missing, damaged, unknown or does not fit."""
    folder = find(path, options.iteration)
    if folder is None:
        folders = sorted(each.name for each in path.iterdir() if each.is_dir())
        rule = "must hold a folder global_stepN with mp_rank_00_model_states.pt for each iteration"
        cure = "Correct the path, or copy the checkpoint again"
        if any(name.startswith("global_step") for name in folders):
            cure = "Name one with --ckpt-step N, or name its folder as SOURCE"
        raise CheckpointError(problem(f"{path}", folders[:8] or Words("none"), rule, cure))
    classes: set[str] = set()
    matches = ((file, MODEL_STATES_FILE.fullmatch(file.name)) for file in sorted(folder.iterdir()))
    files = {int(match[1]): file for file, match in matches if match}
    contents = {number: _load(file, classes) for number, file in files.items()}
    content = contents[min(contents)]
    layers = sorted(each for each in folder.iterdir() if LAYER_FILE.fullmatch(each.name))
    notes = iteration_notes(folder.name, content)
    modules = _read_modules(layers, contents, classes)
    if neox.recognises(content, modules):
        content = {**content, "args": neox.megatron_arguments(folder, content, modules, options, notes)}
        modules = [each._replace(tensors=neox.without_buffers(each.tensors)) for each in modules]
    if modules:
        names, tables = pipeline_tensors(modules, counted=bool(unpickle.fields(content.get("args")).get("num_layers")))
        ranks = max(each.rank for each in modules) + 1
    else:
        ranks = len(files)
        rank_files = [
            RankFile(files[number].name, number, 0, each, model_chunks(each)) for number, each in contents.items()
        ]
        for rank_file in rank_files:
            renumber_layers([rank_file])
        tables = [(rank_file.tensor_rank, rank_file.name, rank_file.tensors) for rank_file in rank_files]
        names = {name: normalize_name(name) for name in flatten(content.get("module"))}
    stated = check_arguments(unpickle.fields(content.get("args"))).get("tensor_model_parallel_size") or ranks
    size, present = max(int(stated), ranks), sorted({rank for rank, _, _ in tables})
    if present != list(range(size)):
        what = f"the tensor-parallel ranks in {folder}"
        rule = f"must be all {size} ranks of the tensor-parallel size, with a file for each"
        raise CheckpointError(problem(what, present, rule, "Copy the missing files"))
    replicas = Replicas(options.replicas, {files[number].name: each for number, each in contents.items()})
    shards = group_by_rank(tables, replicas)

    def states(more: list[str]) -> build.OptimizerStates:
        if (folder / "zero").is_dir():
            return zero.read_universal(folder / "zero", names, classes)
        return zero.read_shards(folder, contents, names, len(shards), classes, replicas)

    version = build.checkpoint_version(content, 3.0)
    return build.build_weights(content, version, shards, states, classes, options, replicas, notes)


class PipelineModule(NamedTuple):
    """The tensors that a tensor-parallel rank has of one module of the pipeline.

    prefix: of its names in the optimizer, before the number.
    """

    where: str
    number: int
    rank: int
    tensors: dict[str, Lazy]
    prefix: str = ""


def _read_modules(
    layers: list[pathlib.Path], contents: Mapping[int, Mapping[str, Any]], classes: set[str]
) -> list[PipelineModule]:
    """The modules of a pipeline, from a file each, or from the model states of a NeoX without pipeline; else []."""
    matches = ((file, LAYER_FILE.fullmatch(file.name)) for file in layers)
    found = [
        PipelineModule(file.name, int(match[1]), int(match[2]), flatten(_load(file, classes)))
        for file, match in matches
        if match
    ]
    found = [module for module in found if module.tensors]
    for rank, content in contents.items() if not layers else ():
        tensors_by_number: dict[int, dict[str, Lazy]] = {}
        for name, tensor in flatten(content.get("module")).items():
            if match := SEQUENTIAL.match(name):
                tensors_by_number.setdefault(int(match[1]), {})[name[match.end() :]] = tensor
        states = f"mp_rank_{rank:02d}_model_states.pt"
        found += [
            PipelineModule(f"{states}, {number}", number, rank, tensors, "sequential.")
            for number, tensors in tensors_by_number.items()
        ]
    return found


def pipeline_tensors(
    modules: list[PipelineModule], counted: bool
) -> tuple[dict[str, str], list[tuple[int, str, dict[str, Lazy]]]]:
    """({pipeline's name of a parameter: Megatron's}, [(tensor-parallel rank, file, tensors)]) of a pipeline's modules.

    A module's number depends on the version (some count a module without parameters), so a module is identified by its
    content. counted: whether arguments give the number of layers, so that it need not be inferred from numbers.
    """
    names: dict[str, str] = {}
    numbers = sorted({each.number for each in modules if any(ATTENTION.search(name) for name in each.tensors)})
    check_consecutive("the modules of the pipeline with layers (layer_NN-model_*)", numbers, first=-1)
    layers = {number: layer for layer, number in enumerate(numbers)}
    if numbers and not any(each.number < numbers[0] for each in modules):
        rule, found = "must be the embedding, which comes before the layers", Words(f"layers from {numbers[0]} on")
        cure = "Copy the complete checkpoint again"
        raise CheckpointError(problem("The first module (layer_NN-model_*)", found, rule, cure))
    if numbers and not counted:
        _check_no_gaps({each.number for each in modules}, numbers)
    tables = []
    for where, number, rank, tensors, prefix in sorted(modules, key=lambda each: (each.rank, each.number)):
        table = {}
        for name, tensor in tensors.items():
            megatron_name = _megatron_name(name, layers.get(number))
            table[megatron_name] = tensor
            names[name if name.startswith("tied_modules.") else f"{prefix}{number}.{name}"] = megatron_name
            if megatron_name.startswith("embedding."):
                names.setdefault(f"tied_modules.embed.{name}", megatron_name)
        tables.append((rank, where, table))
    return names, tables


def _check_no_gaps(modules: set[int], layers: list[int]) -> None:
    """Raise CheckpointError where more than one module without parameters is before or after the layers."""
    before, after = [n for n in modules if n < layers[0]], [n for n in modules if n > layers[-1]]
    ends = [(max(before), layers[0])] if before else []
    for low, high in [*ends, *([(layers[-1], min(after))] if after else [])]:
        if high - low > 2:
            found = Words(f"none from {low + 1} to {high - 1}")
            rule = "must have at most one without parameters between the layers and the modules around them"
            what, cure = "the modules of the pipeline (layer_NN-model_*)", "Copy the complete checkpoint again"
            raise CheckpointError(problem(what, found, rule, cure))


def _megatron_name(name: str, layer: int | None) -> str:
    """Megatron's name of a parameter in a module of the pipeline."""
    name = name.removeprefix("tied_modules.embed.")
    if layer is not None:
        return normalize_name(f"encoder.layers.{layer}.{name}")
    if "embeddings." in name:
        return f"embedding.{name}"
    if name in ("lm_head.weight", "final_linear.weight"):
        return "output_layer.weight"
    return f"encoder.final_layernorm.{name.rpartition('.')[2]}"


def _load(file: pathlib.Path, classes: set[str]) -> dict[str, Any]:
    content, found = unpickle.load(Window.of(file))
    classes.update(found)
    if not isinstance(content, Mapping):
        rule = "must hold a dict, as DeepSpeed's files do"
        raise CheckpointError(problem(str(file), Words(type(content).__name__), rule, "Copy it again"))
    return dict(content)


FORMAT = Format(
    "deepspeed: mp_rank_00_model_states.pt in a folder, or in the global_stepN that `latest` names",
    recognises,
    DeepSpeedOptions,
    read,
)
