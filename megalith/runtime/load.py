"""A trained model back from its checkpoint, whole, on one device."""

from __future__ import annotations

import os
import pathlib

import torch
from torch import nn

from megalith import checkpoint
from megalith.checkpoint import formats, sources
from megalith.config.loading import from_yaml
from megalith.config.run import RunConfig
from megalith.parallel.devices import pick
from megalith.runtime.build import plain
from megalith.runtime.state import weights


def load_plain(
    path: str | os.PathLike, *, device: str | torch.device = "auto", dtype: torch.dtype = torch.float32, iteration: int | None = None
) -> tuple[nn.Module, RunConfig, pathlib.Path | None]:
    """The model of a checkpoint in evaluation mode, the config of its run, and the folder of its tokenizer (None where it has none).

    path: a run's folder, a folder of checkpoints, one checkpoint, or weights in another format (checkpoint/formats.py), also in a
    zip archive or at a URL. device: auto, cpu, cuda, xpu or a torch.device.
    Raises CheckpointError where there is none or it is damaged.
    """
    place = device if isinstance(device, torch.device) else pick(device)
    source = sources.local(path)
    format = formats.recognise(source)
    if format != "megalith":
        return _foreign(formats.read(source, format, formats.Options(iteration=iteration)), place, dtype)
    found = checkpoint.find(source, iteration)
    config = from_yaml(checkpoint.read_config(found), str(found / "config.yaml"))
    model = plain(config.model, place, dtype)
    checkpoint.load(found, weights(model))
    return model, config, found / "tokenizer" if (found / "tokenizer").is_dir() else None


@torch.no_grad()
def _foreign(source: formats.Weights, place: torch.device, dtype: torch.dtype) -> tuple[nn.Module, RunConfig, pathlib.Path | None]:
    model = plain(source.config.model, place, dtype)
    for name, parameter in weights(model).items():
        parameter.copy_(source[name])
    tokenizer = next((file.parent for name, file in source.files.items() if name.startswith("tokenizer/")), None)
    return model, source.config, tokenizer
