"""Existing weights, distributed over the ranks of a pool."""

import torch
from torch import Tensor

from megalith.checkpoint import formats
from megalith.config.run import RunConfig
from megalith.parallel import mesh as meshes
from megalith.runtime.build import build_runtime
from megalith.runtime.load import load_model, weights_of
from megalith.testing.parity import full_tensor


def parallelized(config: RunConfig, folder: str, kind: str) -> dict[str, Tensor]:
    """{name: full parameter} of this rank's stage of the model in a Hugging Face folder: from there, or from memory."""
    mesh = meshes.init_mesh(config.parallel)
    if kind == "folder":
        weights = formats.read(folder)
    elif kind == "transformers":
        import transformers  # here, because it takes seconds

        weights = weights_of(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    else:
        weights = weights_of(load_model(folder, device="cpu")[0])
    runtime = build_runtime(config, mesh, weights=weights)
    return {name: full_tensor(parameter) for name, parameter in runtime.named_parameters()}
