"""What Megatron core computed from the weights of data/megatron/models/core_gpt: logits, losses, every gradient."""

import pathlib

import numpy
import torch

from megalith.checkpoint.weights import Weights
from tests.checkpoint.megatron_files import fused_qkv

EMBEDDINGS = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "position_embedding.weight": "embedding.position_embeddings.weight",
}
NAMES = {  # Megatron core's names of what is one tensor in both models
    "final_norm": "decoder.final_layernorm",
    "attention_norm": "input_layernorm",
    "mlp_norm": "pre_mlp_layernorm",
    "attention.out": "self_attention.linear_proj",
    "mlp.up": "mlp.linear_fc1",
    "mlp.down": "mlp.linear_fc2",
    "layers.": "decoder.layers.",
}


def compare(weights: Weights, model_class, reference: pathlib.Path) -> None:
    """Logits and losses to 1e-5; gradients to 1e-5 of the largest of each."""
    expected = {name: torch.from_numpy(array) for name, array in numpy.load(reference).items()}
    config = weights.config.model
    model = model_class(config).eval()
    tensors = {name.removeprefix("model/"): weights[name] for name in weights}
    model.load_state_dict(tensors | {"head.weight": tensors["embedding.weight"]})
    ids = expected["input_ids"]
    with torch.no_grad():
        assert (model(ids) - expected["logits"]).abs().max() < 1e-5
    losses = model(ids, labels=ids.roll(-1, dims=1))
    assert (losses - expected["token_losses"]).abs().max() < 1e-5
    losses.mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = 0
    for name, gradient in gradients.items():
        if ".attention.q." in name:
            others = [gradients[name.replace(".q.", f".{each}.")] for each in "qkv"]
            gradient = fused_qkv(*others, config, 1, 0, 3.0)
            core_name = name.replace("attention.q", "self_attention.linear_qkv")
        elif ".attention.k." in name or ".attention.v." in name:
            continue
        else:
            core_name = EMBEDDINGS.get(name, name)
        for part, core_part in NAMES.items():
            core_name = core_name.replace(part, core_part)
        reference_gradient = expected[f"grad/{core_name}"]
        tolerance = 1e-5 * reference_gradient.abs().max().clamp(min=1e-3)
        assert (gradient - reference_gradient).abs().max() <= tolerance, name
        compared += 1
    assert compared == sum(name.startswith("grad/") for name in expected)
