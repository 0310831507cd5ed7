"""Export of a user's own model by its own Family: every parameter has a rule, or is left out by name."""

import pathlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from megalith.checkpoint.formats import HuggingFaceOptions
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.huggingface.families.llama import LLAMA
from megalith.checkpoint.formats.huggingface.family import Rule
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError
from megalith.config import architectures, parameter_kinds
from megalith.config.parameters import gpt_shapes, parameter_shapes
from megalith.config.run import RunConfig

KINDS = parameter_kinds.GPT | {"down.weight": parameter_kinds.MATRIX}


def shapes(model) -> dict[str, tuple[int, ...]]:
    """A Llama's parameters and one more."""
    return gpt_shapes(model) | {"down.weight": (2, model.hidden_size)}


def record(family: str) -> architectures.Architecture:
    """The record of this model; family: the name here of its Family."""
    return replace(
        architectures.GPT,
        name="twist",
        shapes=f"{__name__}:shapes",
        kinds=f"{__name__}:KINDS",
        names={"huggingface": f"{__name__}:{family}"},
    )


LACKING = record("LACKING_FAMILY")
OMITTING = record("OMITTING_FAMILY")
NAMING = record("NAMING_FAMILY")
LACKING_FAMILY = replace(LLAMA, architecture="TwistForCausalLM", model_types=(f"{__name__}:LACKING",))
OMITTING_FAMILY = replace(LACKING_FAMILY, model_types=(f"{__name__}:OMITTING",), not_exported=(r"down\.weight",))
NAMING_FAMILY = replace(
    LACKING_FAMILY, model_types=(f"{__name__}:NAMING",), rules=(*LLAMA.rules, Rule("model.twist.down", "down"))
)


def weights_of(name: str) -> Weights:
    """Random weights of the model whose record has this name here."""
    config = RunConfig().replace(
        model_type=f"{__name__}:{name}", num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=16,
        max_position_embeddings=8, position_embedding_type="rope", normalization="RMSNorm", swiglu=True,
        add_bias_linear=False, untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    found = parameter_shapes(config.model)
    return Weights(
        config=config, tensors={f"model/{each}": Lazy.of(torch.randn(shape)) for each, shape in found.items()}
    )


def test_a_parameter_without_a_rule_is_refused(tmp_path: pathlib.Path) -> None:
    message = (
        r"TwistForCausalLM has no rule for 1 of this model's parameters: down\.weight\. "
        r"Add a Rule for each to the family's `rules`, or list it in `not_exported`"
    )
    with pytest.raises(CheckpointError, match=message):
        huggingface.write(weights_of("LACKING"), tmp_path / "out", HuggingFaceOptions())
    assert not (tmp_path / "out").exists()


def test_a_parameter_that_is_not_exported_is_left_out(tmp_path: pathlib.Path) -> None:
    weights = weights_of("OMITTING")
    huggingface.write(weights, tmp_path / "out", HuggingFaceOptions())
    written = load_file(tmp_path / "out/model.safetensors")
    assert len(written) == len(weights) - 1 and not any("twist" in name for name in written)


def test_a_parameter_with_a_rule_is_exported(tmp_path: pathlib.Path) -> None:
    weights = weights_of("NAMING")
    huggingface.write(weights, tmp_path / "out", HuggingFaceOptions())
    written = load_file(tmp_path / "out/model.safetensors")
    assert len(written) == len(weights)
    assert torch.equal(written["model.twist.down.weight"], weights["model/down.weight"])
