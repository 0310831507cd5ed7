"""What Megatron core computed from the weights of data/megatron/models/core_gpt: logits, losses, every gradient."""

import pathlib

import numpy
import torch

from megalith.checkpoint.weights import Weights
from tests.checkpoint.megatron_files import fused

WHOLE = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "position_embedding.weight": "embedding.position_embeddings.weight",
}
NAMES = {  # Megatron core's names of what is one tensor on both sides
    "final_norm": "decoder.final_layernorm", "attention_norm": "input_layernorm", "mlp_norm": "pre_mlp_layernorm", "attention.out":
    "self_attention.linear_proj", "mlp.up": "mlp.linear_fc1", "mlp.down": "mlp.linear_fc2", "layers.": "decoder.layers.",
}  # fmt: skip


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
    seen = 0
    for name, gradient in gradients.items():
        if ".attention.q." in name:
            others = [gradients[name.replace(".q.", f".{each}.")] for each in "qkv"]
            gradient, theirs = (
                fused(*others, config, 1, 0, 3.0),
                name.replace("attention.q", "self_attention.linear_qkv"),
            )
        elif ".attention.k." in name or ".attention.v." in name:
            continue
        else:
            theirs = WHOLE.get(name, name)
        for ours, word in NAMES.items():
            theirs = theirs.replace(ours, word)
        wanted = expected[f"grad/{theirs}"]
        assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1e-3), name
        seen += 1
    assert seen == sum(name.startswith("grad/") for name in expected)
