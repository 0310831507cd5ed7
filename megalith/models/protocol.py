"""What every model offers to what places, trains and stores it: declared here, checked when a model is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from megalith.common.errors import ConfigError, problem
from megalith.config.parameters import parameter_kind, parameter_shapes
from megalith.config.sections.model import ModelConfig


class Model(Protocol):
    """A model, called with keyword arguments by name; an nn.Module made by Model(config, seed).

    config, seed: what it was made from.
    layers: its blocks by their numbers over the whole model, an nn.ModuleDict {"0": ..., "1": ...}; a stage has
        some of them.
    run_layers: called as run_layers(blocks, x, ...) to run blocks in order (layers/block.py: run_in_order);
        recomputation puts its own in its place.
    """

    config: ModelConfig
    seed: int
    layers: nn.ModuleDict
    run_layers: Callable[..., Tensor]

    def restore(self) -> None:
        """Redo what `to_empty` undoes: ties between parameters, and the contents of buffers."""

    def initial(self, name: str) -> tuple[str, float]:
        """How a parameter starts: ("normal", standard deviation), ("xavier", gain) or ("constant", value)."""

    def forward(self, inputs: Tensor, **arguments: Tensor) -> Tensor | tuple[Tensor, ...]:
        """One pass. inputs: ids, or where a stage lacks the embedding the hidden states [b, s, h] that it begins with.

        arguments: what the task and the data give by name; in training always `samples` [b] and `step` [], and where
            sequences are cut, or stages follow one another, `coordinates` [s].
        Returns what the task's losses ask for; where a stage lacks the end of the model, the hidden states that
        flow on.
        """


class LanguageModel(Model, Protocol):
    """A model with an output layer over the vocabulary, which text can be made with.

    head: hidden states to logits; None in a stage that lacks it.
    token_loss: losses of hidden states (layers/loss.py: TokenLoss).

    Text is written by those whose `forward` takes two more arguments: `cache` (layers/cache.py), which they hand to
    their blocks and ask for positions, and `logits_to_keep`, the places whose logits are made.
    """

    head: nn.Module | None
    token_loss: nn.Module


MEMBERS = ("config", "seed", "layers", "run_layers", "restore", "initial")


def check(model: nn.Module, config: ModelConfig) -> None:
    """Raise ConfigError where a whole model lacks what `Model` says, or its record tells of other parameters than
    it has.
    """
    record, address = config.architecture, config.architecture.model
    lacking = [name for name in MEMBERS if not hasattr(model, name)]
    if type(model).forward is nn.Module.forward:
        lacking.append("forward")
    if hasattr(model, "token_loss") and not hasattr(model, "head"):  # see LanguageModel
        lacking.append("head")
    if lacking:
        rule = "a model offers what megalith/models/protocol.py says of each"
        raise ConfigError(problem(f"model {address}", f"no {', '.join(lacking)}", rule, "Add them to the class"))
    there, told = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}, parameter_shapes(config)
    if there != told:
        names = sorted(name for name in there.keys() | told.keys() if there.get(name) != told.get(name))
        found = {name: there.get(name) for name in names[:4]}
        rule = f"the shapes of its record, {record.shapes}, say { ({name: told.get(name) for name in found}) }"
        raise ConfigError(problem(f"parameters of the model {address}", found, rule, "Correct one of the two"))
    for name in there:
        parameter_kind(config, name)
