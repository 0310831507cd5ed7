"""A trained model back from its checkpoint, whole, on one device."""

from __future__ import annotations

import os
import pathlib

import torch
from torch import nn

from megalith import checkpoint
from megalith.config.loading import from_yaml
from megalith.config.run import RunConfig
from megalith.parallel.devices import pick
from megalith.runtime.build import plain
from megalith.runtime.state import weights


def load_plain(
    path: str | os.PathLike, *, device: str | torch.device = "auto", dtype: torch.dtype = torch.float32, iteration: int | None = None
) -> tuple[nn.Module, RunConfig, pathlib.Path]:
    """The model of a checkpoint in evaluation mode, the config of its run, and the checkpoint's own path.

    path: a run's folder, a folder of checkpoints, or one checkpoint. device: auto, cpu, cuda, xpu or a torch.device.
    Raises CheckpointError where there is none or it is damaged.
    """
    found = checkpoint.find(path, iteration)
    config = from_yaml(checkpoint.read_config(found), str(found / "config.yaml"))
    place = device if isinstance(device, torch.device) else pick(device)
    model = plain(config.model, place, dtype)
    checkpoint.load(found, weights(model))
    return model, config, found
