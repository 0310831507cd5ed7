"""What the model of a run is built from, where that is not random weights or a checkpoint that fits it name by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.weights import Weights, for_head, read_megalith
from megalith.common.errors import CheckpointError, problem
from megalith.config.adapters import trained_whole
from megalith.config.flags.text import Words
from megalith.config.heads import is_of_head, new_head
from megalith.config.parameters import parameter_shapes
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.training.resume import lora
from megalith.training.resume.source import is_foreign, read_foreign, source_of, weights_only
from megalith.training.resume.towers import projections, read_towers


class Start(NamedTuple):
    """Weights that a model is built from (None: random ones), and the parameters that they lack, which are drawn."""

    weights: Weights | None = None
    drawn: Sequence[str] = ()


def read_start(config: RunConfig) -> Start:
    """What the model is built from: a base with its adapters, an encoder for a new head, a BERT for two towers.

    Of what is loaded name by name (saving.py: resume) nothing. Raises CheckpointError, see lora.py and towers.py.
    """
    if config.lora.lora_rank:
        found = with_drawn_head(lora.read_start(config), config.model)
        if found.drawn and not trained_whole(config.model):
            rule = "must name a Retro: adapters alone are trained, and what it has beside a GPT would stay as drawn"
            cure = "Train it first without --lora-rank"
            raise CheckpointError(problem("--load for a Retro with --lora-rank", Words("a GPT"), rule, cure))
        return found
    source = source_of(config)
    if source is not None and weights_only(config) and config.model.architecture.head:
        if is_foreign(source):
            weights = read_foreign(config, check_replicas=Ranks().rank == 0)
        else:
            weights = read_megalith(source, config.checkpoint.ckpt_step)
        if new_head(config.model, weights.config.model):
            return with_drawn_head(weights, config.model)
    return Start(towers, projections(config)) if (towers := read_towers(config)) is not None else Start()


def read_weights(config: RunConfig) -> Start:
    """All that --load names, with the adapters of a LoRA run; nothing where it names nothing.

    For a check that takes no steps of a run: a run resumes.
    """
    if config.checkpoint.load is None:
        return Start()
    return with_drawn_head(lora.read_start(config) if config.lora.lora_rank else read_foreign(config), config.model)


def with_drawn_head(weights: Weights | None, model: ModelConfig) -> Start:
    """Weights for `model`, whose head is drawn where they have another one or none."""
    if weights is None or not new_head(model, weights.config.model):
        return Start(weights)
    found, head = for_head(weights, model), model.architecture.head
    return Start(found, [name for name in parameter_shapes(model) if is_of_head(name, head)])
