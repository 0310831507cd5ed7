"""A run's --load where it is no checkpoint of megalith: files of Hugging Face, Megatron or DeepSpeed."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from megalith.checkpoint import formats
from megalith.checkpoint.formats import sources
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, problem
from megalith.common.urls import is_url
from megalith.config.run import RunConfig


def local_path(load: str | os.PathLike, notice: sources.Notice = lambda line: None) -> str | os.PathLike:
    """The path of --load on this machine: itself, or the folder in the cache that a zip archive or a URL became."""
    found = sources.local(load, notice=notice)
    return load if found == pathlib.Path(load) else found


def format_of(load: str | os.PathLike) -> str:
    """The name of --load's format. Raises CheckpointError where there is nothing to start from."""
    if not is_url(load) and not pathlib.Path(load).exists():
        rule = "must be an existing file or folder with a complete checkpoint"
        raise CheckpointError(problem("--load", str(load), rule, "Correct the path"))
    try:
        return formats.recognise(local_path(load))
    except CheckpointError as error:
        raise CheckpointError(
            f"--load {load} holds no complete checkpoint (iter_NNNNNNN/), nor weights in another known format; "
            f"starting from random weights instead would be silent loss. {error}"
        ) from None


def read_options(config: RunConfig, **changes: Any) -> dict[str, Any]:
    """{name: value} of the options with which a run reads another program's files, whatever their format.

    changes: values that replace those of the config.
    """
    c, size = config.checkpoint, config.model.vocab_size
    layout = {"qkv_layout": c.qkv_layout, "swiglu_order": c.swiglu_order, "replicas": c.replicas}
    from_run = {"iteration": c.ckpt_step, "vocabulary_size": lambda data: size, "assumed": vars(config.model)}
    return {**layout, **from_run, **changes}


def read(load: str | os.PathLike, options: Mapping[str, Any]) -> Weights:
    """The weights of --load. Raises CheckpointError for what is missing, damaged, unknown or ambiguous."""
    format = format_of(load)
    if format == "huggingface" and options.get("iteration") is not None:
        rule = f"has no meaning for {load}, a Hugging Face folder, which holds one state of a model"
        raise CheckpointError(problem("--ckpt-step", options["iteration"], rule, "Leave it out"))
    return formats.read(local_path(load), format, options)


def is_weights_only(weights: Weights) -> bool:
    """Whether there are weights alone: of a published or converted model, which belongs to no step of a run."""
    moments = any(name.startswith("optimizer/") for name in weights.tensors)
    return weights.iteration == 0 and not moments and "schedule" not in weights.train_state
