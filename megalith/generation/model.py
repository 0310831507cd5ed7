"""What `megalith.load` gives: a model with its tokenizer; and what its config says of writing text."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from megalith.common.errors import ConfigError
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.data.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(eq=False)
class TextModel:
    """A trained model, its tokenizer, and what is known of where it comes from.

    Called, it is the model: `text_model(input_ids)` gives logits [batch, sequence, vocabulary]. Whatever else a torch
    module has (`parameters()`, `state_dict()`, `head`, ...) is asked of the model.

    model: the plain module, on which nothing is hung. tokenizer: None where there is none. run_config: of the run that
    trained it. notes: what is to be told of files of another format.
    """

    model: nn.Module
    tokenizer: Tokenizer | None = None
    run_config: RunConfig | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: TextModel | nn.Module) -> TextModel:
        """A TextModel as it is, a module as one without a tokenizer."""
        return model if isinstance(model, cls) else cls(model)

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.model.config

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        """As the model's."""
        return self.model(*inputs, **arguments)

    def __getattr__(self, name: str) -> Any:
        """What only the model has."""
        if name == "model":  # while it is being made or unpickled
            raise AttributeError(name)
        return getattr(self.model, name)

    def eval(self) -> TextModel:
        """The same, in evaluation mode."""
        return self.train(False)

    def train(self, mode: bool = True) -> TextModel:
        """The same, in training mode or not."""
        self.model.train(mode)
        return self

    def to(self, *place: Any, **how: Any) -> TextModel:
        """The same, on another device or in another format."""
        self.model.to(*place, **how)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> TextModel:
        """The same, with or without gradients."""
        self.model.requires_grad_(requires_grad)
        return self

    @property
    def end(self) -> int | None:
        """The token that ends a text: of a document, or of what a decoder beside an encoder says. None without a
        tokenizer.
        """
        if self.tokenizer is None:
            return None
        return self.tokenizer.eos if self.config.decoder_layers else self.tokenizer.eod

    @property
    def decoder_start(self) -> int:
        """The token before what a decoder beside an encoder says."""
        if self.tokenizer is None:
            told = "this model has no tokenizer, which alone knows with what token its decoder starts"
            raise ConfigError(f"{told}: set model.tokenizer.")
        return self.tokenizer.decoder_start


def check_length(config: ModelConfig, prompt: int, new: int) -> None:
    """Raise ConfigError where a sequence would be longer than the model's positions; ALiBi and relative ones have no
    such limit.
    """
    limit = config.max_position_embeddings
    if config.positions in ("alibi", "relative") or limit is None:
        return
    which = f"the model's limit (max_position_embeddings) is {limit}"
    if config.decoder_layers:
        if prompt > limit:
            raise ConfigError(
                f"too long: the longest prompt has {prompt} tokens; {which}. Shorten it to {limit} tokens."
            )
        if new >= limit:
            told = f"an answer of {new} new tokens after its start token has {new + 1}"
            raise ConfigError(f"too long: {told}; {which}. Ask for at most {limit - 1} new tokens.")
    elif prompt + new > limit:
        if prompt < limit:
            cure = f"Shorten the prompt or ask for at most {limit - prompt} new tokens"
        elif new < limit:
            cure = f"Shorten the prompt to at most {limit - new} tokens"
        else:
            cure = f"Shorten the prompt, and ask for fewer new tokens, so that they are at most {limit} together"
        told = f"the longest prompt has {prompt} tokens" + (
            f" and {new} new ones are asked for, together {prompt + new}" if new else ""
        )
        raise ConfigError(f"too long: {told}; {which}. {cure}.")
