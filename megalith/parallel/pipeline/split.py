"""Cutting a model into pipeline stages: the same model, without the layers and modules of other stages.

The layers of other stages are deleted from `model.layers`, other modules become None. Layers keep their global numbers.
How many layers each stage has: config/stages.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

from torch import nn

from megalith.common.errors import ConfigError, problem
from megalith.config.sections.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class PipelinePlan:
    """Of a kind of model: which modules a stage has besides its layers, and which hidden states it receives.

    A module that is not named here is on every stage.
    first, last: names of the modules that only the first stage has, or only the last.
    with_layers: modules that a stage has if it has one of certain layers; a function gives the numbers of these.
    received: from the number of a stage's first layer (not 0) to the hidden states that the stage receives, in order.
        Each is named by the argument of forward that holds its ids [..., s], whose shape gives that of the hidden
        states [..., s, h]. These are passed to forward by position.
    """

    first: tuple[str, ...]
    last: tuple[str, ...]
    with_layers: Mapping[str, Callable[[ModelConfig], Collection[int]]] = dataclasses.field(default_factory=dict)
    received: Callable[[int, ModelConfig], tuple[str, ...]] = lambda layer, model: ("inputs",)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Which stage has which modules. stages: the plan of the model. layers: global numbers of each stage's layers."""

    stages: PipelinePlan
    layers: list[range]
    model: ModelConfig

    def received(self, stage: int) -> tuple[str, ...]:
        """The hidden states that a stage after the first receives, in order; see PipelinePlan."""
        return self.stages.received(self.layers[stage].start, self.model)

    def all_received(self) -> list[str]:
        """The hidden states that any stage receives."""
        return list(dict.fromkeys(name for stage in range(1, len(self.layers)) for name in self.received(stage)))

    def has(self, stage: int, name: str) -> bool:
        """Whether a stage has the module or parameter of this name."""
        top, _, rest = name.partition(".")
        if top == "layers" and rest:
            return int(rest.partition(".")[0]) in self.layers[stage]
        if top in self.stages.with_layers:
            return any(number in self.layers[stage] for number in self.stages.with_layers[top](self.model))
        last = len(self.layers) - 1
        return (top not in self.stages.first or stage == 0) and (top not in self.stages.last or stage == last)

    def apply(self, model: nn.Module, stage: int) -> None:
        """Remove the modules of other stages from a whole model. Raises ConfigError for a module that it never had."""
        for name in (*self.stages.first, *self.stages.last, *self.stages.with_layers):
            if not hasattr(model, name):
                rule = f"of {self.model.model_type} must name modules of {type(model).__name__}"
                raise ConfigError(problem("The pipeline stages", name, rule, "Correct the name, or take it out"))
            if not self.has(stage, name):
                setattr(model, name, None)
        for number in list(model.layers):
            if not self.has(stage, f"layers.{number}"):
                del model.layers[number]

    def copies(self, names: dict[str, str]) -> dict[str, list[tuple[int, str]]]:
        """For each parameter of the whole model, the (stage, name there) of its copies, one for each stage that has it.

        For example {"embedding.weight": [(0, "embedding.weight"), (3, "head.weight")], ...} if the two are tied.
        names: see `canonical_names`.
        """
        found: dict[str, list[tuple[int, str]]] = {}
        for stage in range(len(self.layers)):
            seen = set()  # tied within a stage: one parameter under its first name
            for name, first in names.items():
                if self.has(stage, name) and first not in seen:
                    seen.add(first)
                    found.setdefault(first, []).append((stage, name))
        return found


def canonical_names(model: nn.Module) -> dict[str, str]:
    """From each name of a parameter to its canonical name, the first one of a tied parameter.

    For example {"embedding.weight": "embedding.weight", "head.weight": "embedding.weight", ...}.
    """
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
