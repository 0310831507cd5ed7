"""Models of the user's own: what custom_model_provider_function and custom_prepare_model_function may return.

    def provider(pre_process=True, post_process=True):        # True, True: the whole model; stages are cut afterwards
        return "my_twist:Twist"

- The name of an architecture (a short name of config/architectures.py, or `module:name`), or a class that carries one:
  that model is drawn at random, in the sizes of the transformers model that the script prepares.
- A model of transformers: it is placed with its weights, instead of the script's.

Megatron's own modules are not taken: they know of one layout alone. CONTRIBUTING.md has a model in one file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from megalith.common.errors import ConfigError, problem
from megalith.config.architectures import Architecture, architecture
from megalith.config.flags.text import Words

LOSSES = ("lm", "bert", "classification", "t5")  # of config/architectures.py
PARTS = ("pre_process", "post_process", "add_encoder", "add_decoder")  # Megatron's; here a provider makes all of them


class Provided(NamedTuple):
    """What is placed: a model with its weights, or (where model_type is not None) an architecture in its sizes."""

    model: nn.Module
    model_type: str | None = None


def provided(plugin: Any, model: nn.Module) -> Provided:
    """What the plugin's functions return in place of `model`, which the script prepares; `model` without any.

    Raises ConfigError for a prepare function without a provider, and for what cannot be placed.
    """
    provider, prepare = plugin.custom_model_provider_function, plugin.custom_prepare_model_function
    if prepare is not None and provider is None:
        raise ConfigError(
            "You must provide a `custom_model_provider_function` when using a `custom_prepare_model_function`."
        )
    if provider is None:
        return Provided(model)
    found = call_with_parts(provider) if prepare is None else prepare(provider)
    if isinstance(found, (list, tuple)) and len(found) == 1:  # Megatron's prepare functions return a list of stages
        (found,) = found
    if isinstance(found, nn.Module) and hasattr(getattr(found, "config", None), "to_json_string"):
        return Provided(found)
    if (name := address_of(found)) is not None:
        check_loss(name)
        return Provided(model, name)
    rule = "must return a model of transformers, or the name of an architecture of megalith"
    cure = "Describe your model as CONTRIBUTING.md does, and return 'module:name'"
    raise ConfigError(problem("custom_model_provider_function", Words(kind_of(found)), rule, cure))


def check_loss(name: str) -> None:
    """Raise ConfigError where there is no such architecture, or batches of transformers do not fit its loss."""
    loss = architecture(name).loss
    if loss not in LOSSES:
        rule = f"must have one of the losses {', '.join(LOSSES)}, which take the batches of transformers' loaders"
        cure = "For a loss of your own add a custom_train_step_class, or use megalith pretrain"
        raise ConfigError(problem(f"The architecture {name}", Words(f"the loss {loss}"), rule, cure))


def call_with_parts(provider: Callable) -> Any:
    """Call a provider with those of Megatron's arguments that it takes, all True: it makes the whole model."""
    parameters = inspect.signature(provider).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return provider(**{name: True for name in PARTS if takes_all or name in parameters})


def address_of(found: Any) -> str | None:
    """The name by which config/architectures.py finds this: a name itself, or a class that carries an architecture.

    Raises ConfigError for a class of the script itself, which a checkpoint could not name.
    """
    if isinstance(found, str):
        return found
    if not isinstance(found, type) or not isinstance(getattr(found, "architecture", None), Architecture):
        return None
    if found.__module__ == "__main__":
        rule = "must be in a module of its own, so that checkpoints can name it"
        cure = f"Move {found.__name__} into a file beside the script, and import it"
        raise ConfigError(problem("custom_model_provider_function", Words(kind_of(found)), rule, cure))
    return f"{found.__module__}:{found.__qualname__}"


def kind_of(found: Any) -> str:
    """What a provider returned, for a message."""
    return f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__
