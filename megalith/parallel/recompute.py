"""Activations that are recomputed in the backward pass instead of kept (Korthikanti et al., 2022, arXiv 2205.05198).

Dropout masks are a function of seed, step and position (layers/dropout.py), so recomputation gives the same numbers.
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
        run = uniform if (config.recompute_method or "uniform") == "uniform" else block
        model.run_layers = functools.partial(run, config.recompute_num_layers, model.run_layers)


class Recomputed(nn.Module):
    """A module without parameters whose activations are not kept: core attention, the terms of s x s."""

    def __init__(self, core: nn.Module):
        super().__init__()
        self.core = core

    def forward(self, *inputs) -> Tensor:
        """As the forward of `core`."""
        return checkpoint(self.core, *inputs, use_reentrant=False)


def uniform(size: int, run, layers: Sequence[nn.Module], x: Tensor, *arguments) -> Tensor:
    """Of every `size` layers, only the input is kept. run: how the model runs layers, as run(layers, x, *arguments)."""
    for start in range(0, len(layers), size):
        x = checkpoint(run, layers[start : start + size], x, *arguments, use_reentrant=False)
    return x


def block(count: int, run, layers: Sequence[nn.Module], x: Tensor, *arguments) -> Tensor:
    """Of each of the first `count` layers only the input is kept, and everything of the others."""
    for layer in layers[:count]:
        x = checkpoint(run, [layer], x, *arguments, use_reentrant=False)
    return run(layers[count:], x, *arguments)
