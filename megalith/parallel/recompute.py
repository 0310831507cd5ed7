"""Activations that are computed again in the backward pass instead of kept (Korthikanti et al., 2022, arXiv 2205.05198).

Everything random is a function of seed, step and place (layers/dropout.py), so the second time gives the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalith.config.sections.recompute import RecomputeConfig
from megalith.parallel.plan import attentions


def apply(model: nn.Module, config: RecomputeConfig) -> None:
    """Make `model` (or a stage of one) recompute what `config` says; needs `model.layers` and `model.run_layers`."""
    if config.granularity == "selective":
        for layer in model.layers.values():
            for attention in attentions(layer):
                attention.core = Recomputed(attention.core)
    elif config.granularity == "full":
        run = in_groups if (config.recompute_method or "uniform") == "uniform" else first_ones
        model.run_layers = functools.partial(run, config.recompute_num_layers, model.run_layers)


class Recomputed(nn.Module):
    """A module without parameters whose activations are not kept: core attention, the terms of s x s."""

    def __init__(self, core: nn.Module):
        super().__init__()
        self.core = core

    def forward(self, *inputs) -> Tensor:
        """As the module inside."""
        return checkpoint(self.core, *inputs, use_reentrant=False)


def in_groups(size: int, run, layers: Sequence[nn.Module], x: Tensor, *given) -> Tensor:
    """Uniform: of each `size` layers, only the input is kept. run: how a model runs layers, as run(layers, x, *given)."""
    for start in range(0, len(layers), size):
        x = checkpoint(run, layers[start : start + size], x, *given, use_reentrant=False)
    return x


def first_ones(count: int, run, layers: Sequence[nn.Module], x: Tensor, *given) -> Tensor:
    """Block: of each of the first `count` layers only the input is kept, and everything of the others."""
    for layer in layers[:count]:
        x = checkpoint(run, [layer], x, *given, use_reentrant=False)
    return run(layers[count:], x, *given)
