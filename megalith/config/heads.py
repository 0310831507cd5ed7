"""A model with a head on an encoder that other models have too: which of its modules a source's weights lack.

A BERT classifier begins with the weights of a pretrained BERT, or of a classifier of other classes: the encoder is
taken from there, and the head is new.
"""

from __future__ import annotations

from megalith.config.identity import sized_by
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig


def new_head(now: ModelConfig, then: ModelConfig) -> tuple[str, ...]:
    """The modules of `now` that the weights of `then` have nothing for; () where it is the same model, or another."""
    record, source = now.architecture, then.architecture
    if not record.head or record.head_of != (source.head_of or source.name):
        return ()
    same_classes = now.num_classes == then.num_classes or not sized_by(now, "num_classes")
    return () if record.name == source.name and same_classes else record.head


def with_head(then: ModelConfig, now: ModelConfig) -> ModelConfig:
    """The model of a source with the head of `now`, where only that is new: what `now` is compared with."""
    if not new_head(now, then):
        return then
    return RunConfig(model=then).replace(model_type=now.model_type, num_classes=now.num_classes).model


def is_of_head(name: str, head: tuple[str, ...]) -> bool:
    """Whether a parameter ("classifier.weight"), or a tensor of a checkpoint, is of one of these modules."""
    return name.removeprefix("model/").startswith(tuple(f"{module}." for module in head))


def describe_new_head(now: ModelConfig, then: ModelConfig) -> str:
    """A line on a head that is new; "" where there is none."""
    if not (head := new_head(now, then)):
        return ""
    has = f"of {then.num_classes} classes" if then.model_type == now.model_type else "without it"
    return f"the head ({', '.join(head)}) is new and untrained, as the weights are of a {then.model_type} {has}"
