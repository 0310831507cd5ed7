"""From prompts, given as texts or as tokens, to the tokens that a model reads; and the Completion of a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.sections.data import too_many_tokens
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.generation.model import TextModel
from megalith.generation.stream import TextStream

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | None


@dataclasses.dataclass(kw_only=True)
class Completion:
    """A prompt and what the model wrote after it.

    prompt_ids, ids: tokens read (with the end-of-document token that begins an empty prompt) and tokens generated
    (with the one that ended the text). prompt, continuation: their texts, without such tokens; None without a
    tokenizer. answer: whether the continuation is a text without the prompt, as an encoder-decoder writes it.
    logprobs: natural logarithms of the probabilities that the model gave the tokens of `ids`, before temperature and
    filters, where requested. score: of beam search. finish: why the text ended, "stop" or "length".
    """

    prompt_ids: list[int]
    ids: list[int] = dataclasses.field(default_factory=list)
    prompt: str | None = None
    continuation: str | None = None
    logprobs: list[float] | None = None
    score: float | None = None
    finish: str = "length"
    answer: bool = False

    @property
    def text(self) -> str:
        """Prompt and continuation, or the answer alone; needs a tokenizer."""
        if self.prompt is None or self.continuation is None:
            raise ConfigError("this model has no tokenizer, so there is no text: use the token numbers in `ids`.")
        return self.continuation if self.answer else self.prompt + self.continuation

    def stream(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> TextStream:
        """A TextStream that turns the generated tokens into text."""
        return TextStream(tokenizer, [] if self.answer else self.prompt_ids, stops)


def tokenize_prompts(model: TextModel, prompts: Prompts, add_bos: bool = False) -> list[Completion]:
    """A Completion without continuation for each prompt."""
    config = model.config
    if not config.decoder_layers and not config.causal:
        rule = "must read from left to right to generate and to score text"
        raise ConfigError(problem("The model", config.model_type, rule, "Load a GPT or a T5"))
    tokenizer, vocab_size, completions = model.tokenizer, config.vocab_size, []
    all_prompts: Sequence[str | Sequence[int]] = (
        [""] if prompts is None else [prompts] if isinstance(prompts, str) else prompts
    )
    for number, prompt in enumerate(all_prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ConfigError(
                    "this model has no tokenizer: give prompts as lists of token numbers, or set model.tokenizer."
                )
            ids, text = list(map(int, tokenizer.encode(prompt))) if prompt else [], prompt
        else:
            ids, text = [int(i) for i in prompt], None if tokenizer is None else tokenizer.decode(prompt)
        if add_bos or not ids:
            if tokenizer is None:
                raise ConfigError(
                    "an empty prompt starts from the end-of-document token, which only a tokenizer knows: "
                    "give at least one token."
                )
            ids = [tokenizer.require("eod"), *ids]
        wrong = [i for i in ids if not 0 <= i < vocab_size]
        if wrong:
            if tokenizer is not None and tokenizer.vocab_size > vocab_size and isinstance(prompt, str):
                what = (
                    f"the prompt {prompt[:40]!r}"
                    if prompt
                    else "the end of document, from which a text without a prompt starts,"
                )
                raise DataError(f"{too_many_tokens(tokenizer.vocab_size, vocab_size)}; {what} has token {wrong[0]}.")
            rule = f"must be among the {vocab_size} tokens of the model's vocabulary, numbered from 0"
            raise DataError(
                problem(f"Every token of prompt {number}", wrong[0], rule, "Use the tokenizer that it was trained with")
            )
        continuation = None if text is None else ""
        answer = bool(config.decoder_layers)
        completions.append(Completion(prompt_ids=ids, prompt=text, continuation=continuation, answer=answer))
    return completions
