"""A model that is another one and more: which of its modules a source's weights lack.

A BERT classifier begins with the weights of a pretrained BERT, or of a classifier of other classes: the encoder is
taken from there, and the head is new. A Retro begins with those of a GPT (Retro-fitting: Borgeaud et al., 2022,
section 4.3): what reads neighbours is new.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from megalith.config.checks.architectures import RETRO_FIELDS
from megalith.config.identity import sized_by
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig

HEAD_FIELDS = ("num_classes", *RETRO_FIELDS)  # of a model, that the one without the head has no use for


def new_head(now: ModelConfig, then: ModelConfig) -> tuple[str, ...]:
    """The modules of `now`, as patterns, that the weights of `then` lack; () for the same model, or another."""
    record, source = now.architecture, then.architecture
    if not record.head or record.head_of != (source.head_of or source.name):
        return ()
    same_classes = now.num_classes == then.num_classes or not sized_by(now, "num_classes")
    return () if record.name == source.name and same_classes else record.head


def with_head(then: ModelConfig, now: ModelConfig) -> ModelConfig:
    """The model of a source with the head of `now`, where only that is new: what `now` is compared with."""
    if not new_head(now, then):
        return then
    return headed(then, vars(now))


def headed(model: ModelConfig, values: Mapping[str, Any]) -> ModelConfig:
    """`model` with the kind and the head that `values`, fields of a model, have; what they lack it keeps."""
    changed = {name: values[name] for name in ("model_type", *HEAD_FIELDS) if name in values}
    return RunConfig(model=model).replace(**changed).model


def is_of_head(name: str, head: tuple[str, ...]) -> bool:
    """Whether a parameter ("classifier.weight"), or a tensor of a checkpoint, is of one of these modules."""
    return any(fnmatch.fnmatchcase(name.removeprefix("model/"), f"{module}.*") for module in head)


def describe_new_head(now: ModelConfig, then: ModelConfig) -> str:
    """A line on a head that is new; "" where there is none."""
    if not (head := new_head(now, then)):
        return ""
    what = "what reads neighbours" if now.retrieval_layers else "the head"
    has = f"of {then.num_classes} classes" if then.model_type == now.model_type else "without it"
    return f"{what} ({', '.join(head)}) is new and untrained, as the weights are of a {then.model_type} {has}"
