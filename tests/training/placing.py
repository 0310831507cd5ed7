"""Weights that exist, placed on the ranks of a pool."""

import torch
from torch import Tensor

from megalith.checkpoint import formats
from megalith.config.run import RunConfig
from megalith.parallel import mesh as meshes
from megalith.runtime.build import place
from megalith.runtime.load import load_plain, weights_of
from megalith.testing.parity import whole


def placed(config: RunConfig, folder: str, kind: str) -> dict[str, Tensor]:
    """{name: the whole parameter} of this rank's part of the model in a Hugging Face folder: as it lies there, or in memory."""
    mesh = meshes.start(config.parallel)
    if kind == "folder":
        weights = formats.read(folder)
    elif kind == "transformers":
        import transformers  # here, because it takes seconds

        weights = weights_of(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    else:
        weights = weights_of(load_plain(folder, device="cpu")[0])
    return {name: whole(parameter) for name, parameter in place(config, mesh, weights=weights).named_parameters()}
