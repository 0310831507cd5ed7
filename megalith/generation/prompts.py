"""From prompts, given as texts or as tokens, to the tokens that a model reads; and the Completion of a prompt."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.sections.data import too_many_tokens
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.generation.model import TextModel
from megalith.generation.request import TopLogprobs
from megalith.generation.stream import TextStream

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | None


@dataclasses.dataclass(kw_only=True)
class Completion:
    """A prompt and what the model wrote after it.

    prompt_ids, ids: tokens read (with the one that begins an empty prompt) and tokens generated, with those that ended
    the text: a stop token, or those of a stop text. prompt, continuation: their texts, without such tokens; None
    without a tokenizer. finish: why the text ended, "stop" or "length". answer: whether the continuation is a text
    without the prompt, as an encoder-decoder writes it; echo: whether `text` begins with the prompt otherwise.

    logprobs, top_logprobs, where requested: for each of `ids` the natural logarithm of the probability that the model
    gave it, before penalties, temperature and filters, and the likeliest tokens with theirs. prompt_logprobs,
    prompt_top_logprobs: the same for each token of prompt_ids after the first. score: of beam search.
    """

    prompt_ids: list[int]
    ids: list[int] = dataclasses.field(default_factory=list)
    prompt: str | None = None
    continuation: str | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None
    prompt_logprobs: list[float] | None = None
    prompt_top_logprobs: list[TopLogprobs] | None = None
    score: float | None = None
    finish: str = "length"
    answer: bool = False
    echo: bool = True

    @property
    def text(self) -> str:
        """Prompt and continuation, or with answer or without echo the latter alone; needs a tokenizer."""
        if self.prompt is None or self.continuation is None:
            raise ConfigError("this model has no tokenizer, so there is no text: use the token numbers in `ids`.")
        return self.prompt + self.continuation if self.echo and not self.answer else self.continuation

    def stream(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> TextStream:
        """A TextStream that turns the generated tokens into text."""
        return TextStream(tokenizer, [] if self.answer else self.prompt_ids, stops)


def prompt_list(prompts: Prompts) -> Sequence[str | Sequence[int]]:
    """Each prompt by itself: a text, one list of tokens, and None (an empty text) are one prompt."""
    if prompts is None or isinstance(prompts, str):
        return [prompts or ""]
    one = bool(prompts) and all(isinstance(prompt, numbers.Integral) for prompt in prompts)
    return [prompts] if one else prompts  # type: ignore[list-item, return-value]


def tokenize_prompts(model: TextModel, prompts: Prompts, add_bos: bool = False) -> list[Completion]:
    """A Completion without continuation for each prompt; see `tokenize_prompt`."""
    return [tokenize_prompt(model, prompt, number, add_bos) for number, prompt in enumerate(prompt_list(prompts))]


def tokenize_prompt(
    model: TextModel, prompt: str | Sequence[int], number: int = 0, add_bos: bool = False
) -> Completion:
    """A Completion without continuation. number: of the prompt, for errors.

    An empty prompt is what the tokenizer makes of an empty text (Llama's BOS), or else the end-of-document token; that
    token is put before every prompt with add_bos. Raises ConfigError for a model that does not read from left to right
    and for a text without a tokenizer, DataError for tokens that the model does not have.
    """
    config, tokenizer = model.config, model.tokenizer
    if not config.decoder_layers and not config.causal:
        rule = "must read from left to right to generate and to score text"
        raise ConfigError(problem("The model", config.model_type, rule, "Load a GPT or a T5"))
    if isinstance(prompt, str) and prompt and tokenizer is None:
        raise ConfigError(
            "this model has no tokenizer: give prompts as lists of token numbers, or set model.tokenizer."
        )
    if (add_bos or not len(prompt)) and tokenizer is None:
        raise ConfigError(
            "an empty prompt starts from the end-of-document token, which only a tokenizer knows: "
            "give at least one token."
        )
    ids = list(map(int, tokenizer.encode(prompt))) if isinstance(prompt, str) else [int(i) for i in prompt]
    if not ids and not isinstance(prompt, str):
        ids = list(map(int, tokenizer.encode("")))
    if add_bos or not ids:
        ids = [tokenizer.require("eod"), *ids]
    if wrong := [i for i in ids if not 0 <= i < config.vocab_size]:
        raise DataError(_unknown_token(model, prompt, number, wrong[0]))
    text = prompt if isinstance(prompt, str) else None if tokenizer is None else tokenizer.decode(prompt)
    return Completion(
        prompt_ids=ids, prompt=text, continuation=None if text is None else "", answer=bool(config.decoder_layers)
    )


def _unknown_token(model: TextModel, prompt: str | Sequence[int], number: int, token: int) -> str:
    vocab_size, tokenizer = model.config.vocab_size, model.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > vocab_size and isinstance(prompt, str):
        what = f"the prompt {prompt[:40]!r}" if prompt else "what a text without a prompt starts from"
        return f"{too_many_tokens(tokenizer.vocab_size, vocab_size)}; {what} has token {token}."
    rule = f"must be among the {vocab_size} tokens of the model's vocabulary, numbered from 0"
    return problem(f"Every token of prompt {number}", token, rule, "Use the tokenizer that it was trained with")
