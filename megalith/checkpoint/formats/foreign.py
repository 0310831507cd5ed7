"""What --load names where it is no checkpoint of megalith: files of Hugging Face, Megatron or DeepSpeed."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from megalith.checkpoint import formats
from megalith.checkpoint.formats import Options, sources
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, problem
from megalith.config.run import RunConfig


def located(load: str | os.PathLike, tell: sources.Tell = lambda line: None) -> str | os.PathLike:
    """Where --load lies on this machine: the path that it is, or what a zip archive or a URL became in the cache."""
    found = sources.local(load, tell=tell)
    return load if found == pathlib.Path(load) else found


def format_of(load: str | os.PathLike) -> str:
    """The name of the format of what --load names. Raises CheckpointError where there is nothing to begin with."""
    if not sources.is_url(load) and not pathlib.Path(load).exists():
        raise CheckpointError(
            problem(
                "--load",
                str(load),
                "there is no such file or folder, and so no complete checkpoint",
                "Correct the path",
            )
        )
    try:
        return formats.recognise(located(load))
    except CheckpointError as error:
        raise CheckpointError(
            f"--load {load} holds no complete checkpoint (iter_NNNNNNN/), nor weights in another known format; "
            f"starting from random weights instead would be silent loss. {error}"
        ) from None


def options_of(config: RunConfig, **changes: Any) -> Options:
    """How a run reads the files of another program. changes: of these options."""
    c, size = config.checkpoint, config.model.vocab_size
    orders = {"qkv_layout": c.qkv_layout, "swiglu_order": c.swiglu_order, "replicas": c.replicas}
    said = {"iteration": c.ckpt_step, "words": lambda data: size, "assumed": vars(config.model)}
    return Options(**{**orders, **said, **changes})


def read(load: str | os.PathLike, options: Options) -> Weights:
    """The weights that --load names. Raises CheckpointError for what is missing, damaged, unknown or ambiguous."""
    format = format_of(load)
    if format == "huggingface" and options.iteration is not None:
        rule = f"{load} is a Hugging Face folder, which holds one state of a model"
        raise CheckpointError(problem("--ckpt-step", options.iteration, rule, "Leave it out"))
    return formats.read(located(load), format, options)


def beginning(weights: Weights) -> bool:
    """Whether nothing but weights is there: what was published or converted, and belongs to no step of a run."""
    moments = any(name.startswith("optimizer/") for name in weights.tensors)
    return weights.iteration == 0 and not moments and "schedule" not in weights.train_state
