"""Low-rank adapters (LoRA): which linear layers have them, and the names and shapes of their parameters. No torch.

The linear layer `layers.0.attention.q` of weight W [out, in] gets A [rank, in] and B [out, rank], as
`layers.0.attention.q.lora.a` and `layers.0.attention.q.lora.b`, and computes W x + scale B A x. With DoRA the rows of
W + scale B A are scaled to magnitudes [out], `layers.0.attention.q.lora.m`. A model that is an encoder with a head
(architectures.py: `head`) has its head trained whole beside them; what a Retro has beside a GPT gets adapters like all
else.
"""

from __future__ import annotations

import fnmatch

from megalith.config.heads import is_of_head
from megalith.config.parameter_kinds import ADAPTERS
from megalith.config.parameters import Shapes, parameter_kind, parameter_shapes
from megalith.config.run import RunConfig
from megalith.config.sections.lora import LoraConfig
from megalith.config.sections.model import ModelConfig

A, B, M = ADAPTERS  # ends of names


def is_adapter(name: str) -> bool:
    """Whether a parameter, or a tensor of a checkpoint, is an adapter's."""
    return name.endswith((A, B, M))


def is_trained(name: str, model: ModelConfig) -> bool:
    """Whether a LoRA run trains a parameter, or a tensor of a checkpoint: an adapter's, or one of the model's head."""
    return is_adapter(name) or is_of_head(name, trained_whole(model))


def trained_whole(model: ModelConfig) -> tuple[str, ...]:
    """The modules that a LoRA run trains without adapters."""
    return () if model.architecture.retrieval else model.architecture.head


def adaptable_modules(model: ModelConfig) -> Shapes:
    """{linear layer: shape of its weight} of all that can have adapters: those of the transformer blocks, in order."""
    shapes = parameter_shapes(RunConfig(model=model).replace(vocab_size=model.vocab_size or 1).model)
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.startswith("layers.") and name.endswith(".weight") and parameter_kind(model, name).multiplies
    }


def matches(module: str, pattern: str) -> bool:
    """Whether a pattern of --lora-target-modules names a module: all of its name, or the end from some dot on."""
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"*.{pattern}")


def adapted_modules(model: ModelConfig, lora: LoraConfig) -> Shapes:
    """{linear layer: shape of its weight} of those that have adapters; {} without LoRA."""
    patterns = lora.lora_target_modules or ["*"]
    found = adaptable_modules(model) if lora.lora_rank else {}
    return {name: shape for name, shape in found.items() if any(matches(name, pattern) for pattern in patterns)}


def adapter_shapes(model: ModelConfig, lora: LoraConfig) -> Shapes:
    """{parameter: shape} of all adapters; {} without LoRA."""
    found: Shapes = {}
    for module, (outputs, inputs) in adapted_modules(model, lora).items():
        found |= {f"{module}{A}": (lora.lora_rank, inputs), f"{module}{B}": (outputs, lora.lora_rank)}
        found |= {f"{module}{M}": (outputs,)} if lora.use_dora else {}
    return found
