"""Every family that is converted: logits, losses and every gradient equal transformers', for imported weights."""

import pytest
import torch
from torch import Tensor

from megalith.checkpoint import formats
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.huggingface.family import FAMILIES
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.models.gpt import GPT
from tests.originals.families import MODELS

LENGTH = 33


@pytest.fixture
def pair(tmp_path):
    """`pair(name)`: the original with random weights, norms and biases too, and ours as imported from its folder."""

    def make(name: str):
        torch.manual_seed(0)
        original = MODELS[name]().float().eval()
        with torch.no_grad():
            for parameter in original.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        original.save_pretrained(tmp_path)
        weights = formats.read(tmp_path)
        model = GPT(weights.config.model).eval()
        with torch.no_grad():
            for each, parameter in model.named_parameters():
                parameter.copy_(weights[f"model/{each}"])
        assert {f"model/{each}" for each, _ in model.named_parameters()} == set(weights)
        return original, model

    return make


def renamed_gradients(original, model) -> dict[str, Tensor]:
    """The original's gradients under megalith's names."""
    family = FAMILIES.find(original.config.model_type)
    theirs = {each: parameter.grad for each, parameter in original.named_parameters()}
    theirs["embed_out.weight"] = theirs.get("lm_head.weight")  # NeoX's files have another name than its module
    return {
        each: part.read()
        for rule, name, names in huggingface.parameter_rules(family, model.config)
        for each, part in zip(names, rule.conversion.from_hf(Lazy.of(theirs[name]), model.config))
    }


@pytest.mark.parametrize("name", MODELS)
def test_logits_losses_and_gradients_equal_the_original(name: str, pair) -> None:
    original, model = pair(name)
    ids = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    logits = original(ids).logits
    assert (model(ids) - logits).abs().max() < 1e-5
    labels = ids.roll(-1, dims=1)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, LENGTH)
    losses = model(ids, labels=labels)
    assert (losses - wanted).abs().max() < 1e-5
    wanted.mean().backward()
    (losses / losses.numel()).sum().backward()
    theirs = renamed_gradients(original, model)
    for each, parameter in model.named_parameters():
        # A key bias shifts all scores alike: its gradient is zero.
        assert theirs[each].norm() > 1e-4 or each.endswith("k.bias"), each
        assert (parameter.grad - theirs[each]).abs().max() < 1e-5, each
