"""What every model must offer to the code that shards, trains and stores it: declared here, checked on building it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.config.parameters import parameter_kind, parameter_shapes
from megalith.config.sections.model import ModelConfig


class Model(Protocol):
    """A model, called with keyword arguments by name; an nn.Module made by Model(config, seed).

    config, seed: what it was made from.
    layers: its blocks by their numbers in the whole model, an nn.ModuleDict {"0": ..., "1": ...}; a stage has
        some of them.
    run_layers: called as run_layers(blocks, x, ...) to run blocks in order (layers/block.py: run_in_order);
        recomputation replaces it.
    """

    config: ModelConfig
    seed: int
    layers: nn.ModuleDict
    run_layers: Callable[..., Tensor]

    def restore(self) -> None:
        """Restore what `to_empty` loses: ties between parameters, and the contents of buffers."""

    def initial(self, name: str) -> tuple[str, float]:
        """A parameter's initialization: ("normal", standard deviation), ("xavier", gain) or ("constant", value)."""

    def forward(self, inputs: Tensor, **arguments: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The forward pass. inputs: ids, or on a stage without the embedding the hidden states [b, s, h] it receives.

        arguments: what the task and the data give by name; in training always `samples` [b] and `step` [], under
            context or pipeline parallelism also `coordinates` [s].
        Returns what the task's losses need; on a stage before the last, the hidden states that it sends on.
        """


class LanguageModel(Model, Protocol):
    """A model with an output layer over the vocabulary.

    head: hidden states to logits; None in a stage that lacks it.
    token_loss: losses of hidden states (layers/loss.py: TokenLoss).

    Text can be generated with those whose `forward` takes two more arguments: `cache` (layers/cache.py), which gives
    positions and is passed to the blocks, and `logits_to_keep`, the positions whose logits are computed.
    """

    head: nn.Module | None
    token_loss: nn.Module


MEMBERS = ("config", "seed", "layers", "run_layers", "restore", "initial")


def check(model: nn.Module, config: ModelConfig) -> None:
    """Raise ConfigError where a whole model lacks a member of `Model`, or its parameters differ from its record's."""
    record, address = config.architecture, config.architecture.model
    missing = [name for name in MEMBERS if not hasattr(model, name)]
    if type(model).forward is nn.Module.forward:
        missing.append("forward")
    if hasattr(model, "token_loss") and not hasattr(model, "head"):  # see LanguageModel
        missing.append("head")
    if missing:
        rule = "must have the members that megalith/models/protocol.py declares"
        found = Words(f"no {', '.join(missing)}")
        raise ConfigError(problem(f"The model {address}", found, rule, "Add them to the class"))
    actual = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    declared = parameter_shapes(config)
    if actual != declared:
        names = sorted(name for name in actual.keys() | declared.keys() if actual.get(name) != declared.get(name))
        shapes = {name: actual.get(name) for name in names[:4]}
        expected = {name: declared.get(name) for name in shapes}
        rule = f"must have the shapes of its record, {record.shapes}: {expected}"
        raise ConfigError(problem(f"The parameters of the model {address}", shapes, rule, "Correct one of the two"))
    for name in actual:
        parameter_kind(config, name)
