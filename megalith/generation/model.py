"""TextModel, a model with its tokenizer, as `megalith.load` returns it; and the longest text that its config allows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from megalith.common.errors import ConfigError
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.runtime.build import Runtime

Retriever = Callable[[Sequence[int]], Sequence[Sequence[int]]]  # see retrieval/rows.py


class TooLong(ConfigError):
    """A prompt and its new tokens are more than the model, or its engine, has positions for."""


@dataclasses.dataclass(eq=False)
class TextModel:
    """A trained model, its tokenizer, and what is known about its origin.

    A call is a call of the model: `text_model(input_ids)` gives logits [batch, sequence, vocabulary]. Other attributes
    of a torch module (`parameters()`, `state_dict()`, `head`, ...) are those of the model.

    model: the module, to which no attribute is added. tokenizer: None where there is none. run_config: of the run that
    trained it. notes: messages to the user about files of another format. runtime: where several processes hold the
    model together; `model` is then this process's part of it, or its first pipeline stage here. retriever: of a Retro,
    from the ids of a chunk to those of its neighbours; without it the model reads none.
    """

    model: nn.Module
    tokenizer: Tokenizer | None = None
    run_config: RunConfig | None = None
    notes: tuple[str, ...] = ()
    runtime: Runtime | None = None
    retriever: Retriever | None = None

    @classmethod
    def of(cls, model: TextModel | Runtime | nn.Module) -> TextModel:
        """A TextModel unchanged, or a TextModel of a module or a Runtime, without a tokenizer."""
        if isinstance(model, Runtime):
            return cls(model.stages[0].model, run_config=model.config, runtime=model)
        return model if isinstance(model, cls) else cls(model)

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self.model.config

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        """Call the model."""
        return self.model(*inputs, **arguments)

    def __getattr__(self, name: str) -> Any:
        """An attribute that only the model has."""
        if name == "model":  # while this object is being built or unpickled
            raise AttributeError(name)
        return getattr(self.model, name)

    def eval(self) -> TextModel:
        """Put the model into evaluation mode and return this object."""
        return self.train(False)

    def train(self, mode: bool = True) -> TextModel:
        """Put the model into training or evaluation mode and return this object."""
        (self.model if self.runtime is None else self.runtime).train(mode)
        return self

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block the model is in evaluation mode, and ready for an Engine; afterwards it is as it was."""
        if self.runtime is not None:
            with self.runtime.evaluating():
                yield
            return
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def to(self, *args: Any, **kwargs: Any) -> TextModel:
        """Move the model to a device or a dtype, as torch.nn.Module.to, and return this object."""
        self.model.to(*args, **kwargs)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> TextModel:
        """Switch gradients of all parameters on or off and return this object."""
        self.model.requires_grad_(requires_grad)
        return self

    @property
    def end_token(self) -> int | None:
        """The token that ends a text: end of document, or end of sequence for an encoder-decoder. None without a
        tokenizer.
        """
        if self.tokenizer is None:
            return None
        return self.tokenizer.eos if self.config.decoder_layers else self.tokenizer.eod

    @property
    def decoder_start(self) -> int:
        """The token with which the decoder of an encoder-decoder starts."""
        if self.tokenizer is None:
            raise ConfigError(
                "this model has no tokenizer, and only a tokenizer knows the token with which the decoder starts: "
                "set model.tokenizer."
            )
        return self.tokenizer.decoder_start


def most_positions(config: ModelConfig) -> int | None:
    """The most tokens that a model can read at a time; None where there is no limit: ALiBi, relative positions."""
    return None if config.positions in ("alibi", "relative") else config.max_position_embeddings


def check_length(config: ModelConfig, prompt: int, new: int, name: str = "the prompt") -> None:
    """Raise TooLong where a prompt of so many tokens, called `name`, and so many new ones exceed the positions."""
    if (limit := most_positions(config)) is None:
        return
    which = f"the model's limit (max_position_embeddings) is {limit}"
    if config.decoder_layers:
        if prompt > limit:
            raise TooLong(f"too long: {name} has {prompt} tokens; {which}. Shorten it to {limit} tokens.")
        if new >= limit:
            found = f"an answer of {new} new tokens after its start token has {new + 1}"
            raise TooLong(f"too long: {found}; {which}. Ask for at most {limit - 1} new tokens.")
    elif prompt + new > limit:
        if prompt < limit:
            cure = f"Shorten the prompt or ask for at most {limit - prompt} new tokens"
        elif new < limit:
            cure = f"Shorten the prompt to at most {limit - new} tokens"
        else:
            cure = f"Shorten the prompt, and ask for fewer new tokens, so that they are at most {limit} together"
        found = f"{name} has {prompt} tokens" + (
            f" and {new} new ones are asked for, together {prompt + new}" if new else ""
        )
        raise TooLong(f"too long: {found}; {which}. {cure}.")
