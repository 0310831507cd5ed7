"""Cutting a model into stages: the same model with the modules it lacks set to None, layers kept under their global numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

from torch import nn

from megalith.common.errors import ConfigError, problem
from megalith.config.sections.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Stages:
    """What of a model a pipeline stage has besides its layers, and what flows into it. Other modules are everywhere.

    first, last: names of modules that the first stage alone has, and the last.
    beside: modules that every stage has which has one of certain layers; a function gives their numbers.
    received: the inputs whose hidden states flow into a stage, in order, given the number of its first layer (not
        0). They are
        named as forward's arguments; where nothing flowed in they are ids [..., s], whose shape says that of hidden
        states.
    """

    first: tuple[str, ...]
    last: tuple[str, ...]
    beside: Mapping[str, Callable[[ModelConfig], Collection[int]]] = dataclasses.field(default_factory=dict)
    received: Callable[[int, ModelConfig], tuple[str, ...]] = lambda layer, model: ("inputs",)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Which stage has what. layers: global numbers of the layers of each stage."""

    stages: Stages
    layers: list[range]
    model: ModelConfig

    def received(self, stage: int) -> tuple[str, ...]:
        """What flows into a stage behind the first: the inputs whose hidden states they are, in order."""
        return self.stages.received(self.layers[stage].start, self.model)

    def streams(self) -> list[str]:
        """The inputs whose hidden states flow between any two stages."""
        return list(dict.fromkeys(name for stage in range(1, len(self.layers)) for name in self.received(stage)))

    def has(self, stage: int, name: str) -> bool:
        """Whether a stage has the module or parameter of this name."""
        top, _, rest = name.partition(".")
        if top == "layers" and rest:
            return int(rest.partition(".")[0]) in self.layers[stage]
        if top in self.stages.beside:
            return any(number in self.layers[stage] for number in self.stages.beside[top](self.model))
        last = len(self.layers) - 1
        return (top not in self.stages.first or stage == 0) and (top not in self.stages.last or stage == last)

    def apply(self, model: nn.Module, stage: int) -> None:
        """Take from a whole model what the stage lacks. Raises ConfigError for a module that it never had."""
        for name in (*self.stages.first, *self.stages.last, *self.stages.beside):
            if not hasattr(model, name):
                rule = f"the stages of {self.model.model_type} name modules of {type(model).__name__}"
                raise ConfigError(problem("pipeline stages", name, rule, "Correct the name, or take it out"))
            if not self.has(stage, name):
                setattr(model, name, None)
        for number in list(model.layers):
            if not self.has(stage, f"layers.{number}"):
                del model.layers[number]

    def holders(self, names: dict[str, str]) -> dict[str, list[tuple[int, str]]]:
        """For each parameter of the whole model, the (stage, name there) of its copies. names: see `canonical_names`."""
        found: dict[str, list[tuple[int, str]]] = {}
        for stage in range(len(self.layers)):
            seen = set()  # tied within a stage: one parameter under its first name
            for name, first in names.items():
                if self.has(stage, name) and first not in seen:
                    seen.add(first)
                    found.setdefault(first, []).append((stage, name))
        return found


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Each name of a parameter to the first it has, under which a tied one is known: {"head.weight": "embedding.weight", ...}."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
