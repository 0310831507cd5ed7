"""A trained model back from its checkpoint, whole, on one device."""

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
from megalith.checkpoint.formats import sources
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.tensors.lazy import Lazy, check_range
from megalith.checkpoint.weights import Weights, own
from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.config.checks.checks import limit
from megalith.config.flags.loading import stored_config
from megalith.config.flags.text import Problem, fail, flag, unknown
from megalith.config.flags.values import convert, fields
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.parallel.devices import pick
from megalith.runtime.build import plain
from megalith.runtime.state import weights


def load_plain(
    path: str | os.PathLike | nn.Module | Weights,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    iteration: int | None = None,
    options: formats.Options | None = None,
) -> tuple[nn.Module, RunConfig, pathlib.Path | None]:
    """The model of a checkpoint in evaluation mode, the config of its run, and the folder of its tokenizer (None where it has none).

    path: a run's folder, a folder of checkpoints, one checkpoint, or weights in another format (checkpoint/formats/__init__.py),
    also in a zip archive or at a URL; a model in memory, of transformers or of ours; or Weights.
    device: auto, cpu, cuda, xpu or a torch.device. options: how another format is read.
    What is to be told of another format is in the model's `.notes`.
    Raises CheckpointError where there is none, it is damaged, or `dtype` cannot hold its weights.
    """
    place = device if isinstance(device, torch.device) else pick(device)
    if isinstance(path, (nn.Module, Weights)):
        return _made(path if isinstance(path, Weights) else weights_of(path), place, dtype)
    source = sources.local(path)
    format, options = formats.recognise(source), options or formats.Options()
    if format != "megalith":
        options = dataclasses.replace(options, iteration=iteration if iteration is not None else options.iteration)
        return _made(formats.read(source, format, options), place, dtype)
    check_whole(source, options.overrides)
    found = checkpoint.find(source, iteration)
    config = stored_config(checkpoint.read_config(found), str(found / "config.yaml"))
    model = plain(config.model, place, dtype)
    check_range({name: lazy for name, lazy in own(found).tensors.items() if name.startswith("model/")}, dtype)
    checkpoint.load(found, weights(model))
    model.notes = ()
    return model, config, found / "tokenizer" if (found / "tokenizer").is_dir() else None


def check_whole(source: pathlib.Path, given: Collection[str]) -> None:
    """Raise ConfigError where fields of the config are given for a checkpoint of megalith."""
    if given:
        shown = ", ".join(map(flag, sorted(given)))
        rule = "a checkpoint of megalith says all of its model itself"
        raise ConfigError(
            problem(f"{source}", shown, rule, "Leave it out; it is for other formats, whose files may lack it")
        )


def _made(source: Weights, place: torch.device, dtype: torch.dtype) -> tuple[nn.Module, RunConfig, pathlib.Path | None]:
    model = plain(source.config.model, place, dtype)
    check_range({name: lazy for name, lazy in source.tensors.items() if name.startswith("model/")}, dtype)
    checkpoint.fill(source, weights(model))
    model.notes = source.notes
    return model, source.config, source.tokenizer


def weights_of(model: nn.Module) -> Weights:
    """The weights of a model of ours or of transformers, whose memory they share; CheckpointError for others."""
    if isinstance(config := getattr(model, "config", None), ModelConfig):
        tensors = {name: Lazy.of(tensor) for name, tensor in weights(model).items()}
        return Weights(config=RunConfig(model=config), tensors=tensors, source=type(model).__name__)
    if hasattr(config, "to_json_string"):
        return huggingface.of_model(model)
    rule = "its attribute `config` is a ModelConfig, or a configuration of transformers"
    raise CheckpointError(problem("model", type(model).__name__, rule, "Read it from the folder that it was saved in"))


def reading(qkv_layout: str, swiglu_order: str, replicas: str, given: Mapping[str, Any]) -> formats.Options:
    """How another format is read. given: fields of the model that its files lack. Raises ConfigError with all that cannot be."""
    problems = [
        problem(name, value, f"it is one of {', '.join(known)}", f"Write {name} {known[0]}")
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
        values[name], trouble = convert(fields()[name], raw, flag(name))
        if trouble is None and (wrong := limit(name, values[name])):
            trouble = Problem((name,), problem(flag(name), raw, *wrong))
        problems += [trouble.text] if trouble else []
    fail(problems)
    return formats.Options(qkv_layout=qkv_layout, swiglu_order=swiglu_order, replicas=replicas, overrides=values)
