"""A tensor-parallel plan: patterns of module names, and the style by which each such module is split.

A plan that leaves a parameter out is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import nn
from torch.distributed.tensor import DTensor

from megalith.common.errors import ConfigError
from megalith.parallel.collectives import Axis

Style = Callable[[nn.Module, nn.Module, Axis], nn.Module]  # (module, its parent, axis) -> its replacement
Plan = Mapping[str, Style]


def apply(model: nn.Module, plan: Plan, axis: Axis) -> None:
    """Replace the modules that the plan names, in its order. Parameters keep their names and ties.

    In a pattern `*` stands for any one name. A module that is None (a pipeline stage lacks it) is skipped. A pattern
    that matches nothing and a parameter that no pattern names are ConfigErrors, because the model would train wrongly
    without any sign of it.
    """
    ties: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        ties.setdefault(id(parameter), []).append(name)
    for pattern, style in plan.items():
        for parent, name in matches(model, pattern):
            setattr(parent, name, style(getattr(parent, name), parent, axis))
    for first, *others in ties.values():
        for name in others:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, model.get_parameter(first))
    missing = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if missing:
        raise ConfigError(
            f"The tensor-parallel plan of {type(model).__name__} must name every parameter, as split or replicated; "
            f"no pattern names {', '.join(missing)}. Add its module to the plan."
        )


def attentions(layer: nn.Module) -> list[nn.Module]:
    """The attention modules in a layer, at any depth: those with a projection `q` and a `core`."""
    return [module for module in layer.modules() if hasattr(module, "q") and hasattr(module, "core")]


def matches(model: nn.Module, pattern: str) -> Iterator[tuple[nn.Module, str]]:
    """(parent, attribute) of the modules that the pattern names and that are not None."""
    *path, last = pattern.split(".")
    parents = [model]
    for step in path:
        parents = [child for parent in parents for child in children(parent, step, pattern)]
    for parent in parents:
        for name in list(parent._modules) if last == "*" else [last]:
            if next(iter(children(parent, name, pattern)), None) is not None:
                yield parent, name


def children(parent: nn.Module, step: str, pattern: str) -> list[nn.Module]:
    """The modules under one step of a pattern."""
    if step == "*":
        return [child for child in parent.children() if child is not None]
    if not hasattr(parent, step):
        raise ConfigError(
            f"The tensor-parallel plan must have patterns of modules that exist; {pattern!r} matches nothing, as "
            f"{type(parent).__name__} has no {step!r}. Correct the pattern, or take it out of the plan."
        )
    child = getattr(parent, step)
    return [] if child is None else [child]
