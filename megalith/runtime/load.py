"""Loading a trained model from its checkpoint: unsharded on one device, or in a layout on many."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from megalith import checkpoint
from megalith.checkpoint import formats
from megalith.checkpoint.formats import adapters, sources
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.options import Options, as_mapping
from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store.loading import verify_on_all_ranks
from megalith.checkpoint.tensors.lazy import Lazy, check_range
from megalith.checkpoint.weights import Weights, read_megalith
from megalith.common.environment import local_rank
from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.common.urls import is_url
from megalith.config.checks.checks import violated_limit
from megalith.config.checks.parallel import layout_problems
from megalith.config.flags.text import Problem, Words, fail, flag, unknown
from megalith.config.flags.values import convert, fields
from megalith.config.run import RunConfig
from megalith.config.sections.lora import LoraConfig
from megalith.config.sections.model import ModelConfig
from megalith.config.sections.parallel import ParallelConfig
from megalith.config.sections.precision import PrecisionConfig
from megalith.config.sections.recompute import RecomputeConfig
from megalith.parallel.devices import pick_device
from megalith.runtime.build import Runtime, build_model, build_runtime, init_mesh
from megalith.runtime.state import weights


def load_model(
    path: str | os.PathLike | nn.Module | Weights,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    iteration: int | None = None,
    options: Options | Mapping[str, Any] | None = None,
    merge_adapter: bool = True,
) -> tuple[nn.Module, RunConfig, pathlib.Path | None]:
    """The model of a checkpoint in evaluation mode, the config of its run, and the folder of its tokenizer or None.

    path: a run's folder, a folder of checkpoints, one checkpoint, or weights in another format
        (checkpoint/formats/__init__.py), also in a zip archive or at a URL; a model in memory, of transformers or of
        megalith; or Weights.
    device: auto, cpu, cuda, xpu or a torch.device.
    options: how another format is read (checkpoint/formats/options.py), an Options or {name: value}.
    merge_adapter: add low-rank adapters to the weights; False keeps them apart, as they were trained.
    Notes for the user on another format are in the model's `.notes`.
    Raises CheckpointError where there is no checkpoint, it is damaged, or `dtype` cannot hold its weights.
    """
    device = device if isinstance(device, torch.device) else pick_device(device)
    source = open_weights(path, iteration, options)
    source = adapters.merge(source, widen=True) if merge_adapter else source
    lora = source.config.lora
    model = build_model(source.config.model, device, dtype, lora=lora if lora.lora_rank else None)
    check_range(model_tensors(source), dtype)
    checkpoint.fill(source, weights(model))
    model.notes = source.notes
    return model, source.config, source.tokenizer


def load_runtime(
    path: str | os.PathLike | nn.Module | Weights,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    iteration: int | None = None,
    options: Options | Mapping[str, Any] | None = None,
    merge_adapter: bool = True,
) -> tuple[Runtime, Weights]:
    """As `load_model`, in a layout: each process reads the part of the weights that it holds. Every process calls it.

    parallel: its device is this process's kind of device. Raises ConfigError too, where the model or the number of
    processes does not fit the layout.
    """
    mesh, ranks = init_mesh(parallel), Ranks()
    if isinstance(path, (str, os.PathLike)) and (is_url(path) or sources.is_archive(pathlib.Path(path))):
        # One process of each machine fetches it, or unpacks it.
        ranks.on_every_rank(lambda: None if local_rank() else sources.local(path))
    source = open_weights(path, iteration, options)
    source = adapters.merge(source, widen=True) if merge_adapter else source
    config = dataclasses.replace(
        source.config, parallel=parallel, precision=PrecisionConfig(), recompute=RecomputeConfig()
    ).replace(seq_length=None)  # without what only training needs
    fail(each.text for each in layout_problems(config, mesh.world_size))
    tensors = list(model_tensors(source).items())[ranks.rank :: ranks.size]
    ranks.on_every_rank(lambda: check_range(dict(tensors), dtype))  # which reads all of them, divided among processes
    runtime = build_runtime(config, mesh, dtype, source)
    runtime.train(False)
    return runtime, source


def open_weights(
    path: str | os.PathLike | nn.Module | Weights, iteration: int | None = None,
    options: Options | Mapping[str, Any] | None = None,
) -> Weights:  # fmt: skip
    """The weights that `load_model` reads, those of adapters apart (formats/adapters.py: merge).

    Of a checkpoint of megalith all files are read, to compare checksums, but not of the base that adapters name.
    """
    options = as_mapping(options)
    if isinstance(path, (nn.Module, Weights)):
        found, adapter = path if isinstance(path, Weights) else weights_of(path), options.get("adapter")
        return found if adapter is None else adapters.attach(found, adapters.read_adapter(adapter, found))
    source = sources.local(path)
    format = formats.recognise(source)
    if format != "megalith":
        return formats.read(source, format, options if iteration is None else {**options, "iteration": iteration})
    found = checkpoint.find(source, iteration)
    if overrides := options.get("overrides"):
        stored = read_megalith(found).config.flat()
        check_no_overrides(source, [name for name, value in overrides.items() if stored[name] != value])
    verify_on_all_ranks(found, Ranks())
    return formats.read(found, format, {name: value for name, value in options.items() if name == "adapter"})


def model_tensors(source: Weights) -> dict[str, Lazy]:
    """The tensors of the model, without those of an optimizer."""
    return {name: lazy for name, lazy in source.tensors.items() if name.startswith("model/")}


def check_no_overrides(source: pathlib.Path, overrides: Collection[str]) -> None:
    """Raise ConfigError where fields of the config of a checkpoint of megalith are given other values."""
    if overrides:
        flags = ", ".join(map(flag, sorted(overrides)))
        rule = "is a checkpoint of megalith, which holds all fields of its model and takes no others"
        cure = "Leave it out, or give the value that the checkpoint has"
        raise ConfigError(problem(f"{source}", Words(flags), rule, cure))


def weights_of(model: nn.Module) -> Weights:
    """The weights of a model of megalith or of transformers, whose memory they share; CheckpointError for others."""
    if isinstance(config := getattr(model, "config", None), ModelConfig):
        tensors = {name: Lazy.of(tensor) for name, tensor in weights(model).items()}
        run = RunConfig(model=config, lora=getattr(model, "lora", LoraConfig()))
        return Weights(config=run, tensors=tensors, source=type(model).__name__)
    if hasattr(config, "to_json_string"):
        return huggingface.weights_of_module(model)
    rule = "must have an attribute `config` that is a ModelConfig, or a configuration of transformers"
    found = Words(type(model).__name__)
    raise CheckpointError(problem("The model", found, rule, "Read it from the folder that it was saved in"))


def format_options(qkv_layout: str, swiglu_order: str, replicas: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of reading another format. given: fields of the model that its files lack.

    Raises ConfigError with all problems.
    """
    problems = [
        problem(name, value, f"must be one of {', '.join(known)}", f"Write {name} {known[0]}")
        for name, value, known in (
            ("--qkv-layout", qkv_layout, formats.QKV_LAYOUTS),
            ("--swiglu-order", swiglu_order, formats.SWIGLU_ORDERS),
            ("--replicas", replicas, formats.REPLICAS),
        )
        if value not in known
    ]
    known, values = [name for name, each in fields().items() if each.section == "model"], dict[str, Any]()
    for name, raw in given.items():
        if name not in known:
            problems.append(unknown("field of the model", name, known, "megalith pretrain --help lists them as flags"))
            continue
        values[name], mistake = convert(fields()[name], raw, flag(name))
        if mistake is None and (violated := violated_limit(name, values[name])):
            mistake = Problem((name,), problem(flag(name), raw, *violated))
        problems += [mistake.text] if mistake else []
    fail(problems)
    return {"qkv_layout": qkv_layout, "swiglu_order": swiglu_order, "replicas": replicas, "overrides": values}
