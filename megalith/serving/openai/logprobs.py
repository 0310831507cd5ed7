"""Log-probabilities of tokens in the two forms of OpenAI, with the place of each token in the text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.generation.prompts import Completion
from megalith.generation.request import TopLogprobs
from megalith.generation.stream import TextStream
from megalith.serving.token_texts import TokenTexts


class Scored(NamedTuple):
    """A token, its log-probability and the likeliest tokens with theirs; where its text begins, in characters.

    logprob: None for the first token of a prompt, which nothing precedes.
    """

    token: int
    logprob: float | None
    top: TopLogprobs
    offset: int


class Positions:
    """The new tokens of a completion, in their order, with the place of each in the choice's text.

    Tokens of a stop text, which are no part of it, have the places that they would have.
    """

    def __init__(self, tokenizer: Tokenizer, completion: Completion):
        """completion: of which only the prompt is read."""
        self.start = len(completion.prompt or "") if completion.echo and not completion.answer else 0
        self.stream = completion.stream(tokenizer)

    def score(self, token: int, logprob: float | None, top: TopLogprobs) -> Scored:
        """The next token."""
        offset = self.start + len(self.stream.text)
        self.stream.push(token)
        return Scored(token, logprob, top, offset)


def prompt_scores(tokenizer: Tokenizer, completion: Completion) -> list[Scored]:
    """The tokens of a prompt that is echoed.

    A token that the tokenizer adds, and that the prompt's text has not, is at its beginning. Where a tokenizer changes
    texts (lower case, other forms of a character) places are counted from the prompt's end.
    """
    text, ids, offsets = TextStream(tokenizer, []), completion.prompt_ids, list[int]()
    for token in ids:
        offsets.append(len(text.text))
        text.push(token)
    text.finish()
    length = len(completion.prompt or "")
    before = len(text.text) - length
    logprobs: Sequence[float | None] = [None, *(completion.prompt_logprobs or ())]
    tops: Sequence[TopLogprobs] = [(), *(completion.prompt_top_logprobs or [()] * (len(ids) - 1))]
    return [
        Scored(token, logprob, top, min(max(offset - before, 0), length))
        for token, logprob, top, offset in zip(ids, logprobs, tops, offsets)
    ]


def continuation_scores(tokenizer: Tokenizer, completion: Completion) -> list[Scored]:
    """The new tokens of a completion."""
    positions = Positions(tokenizer, completion)
    logprobs, tops = completion.logprobs or [], completion.top_logprobs or [()] * len(completion.ids)
    return [positions.score(*each) for each in zip(completion.ids, logprobs, tops)]


def completion_logprobs(texts: TokenTexts, scored: Iterable[Scored]) -> dict[str, Any]:
    """The form of completions: lists, one number for each token.

    top_logprobs has the token itself, too. Of tokens with the same text the likeliest counts.
    """
    scored = list(scored)
    return {
        "tokens": [texts(each.token)[0] for each in scored],
        "token_logprobs": [each.logprob for each in scored],
        "top_logprobs": [
            None if each.logprob is None else _by_text(texts, (*each.top, (each.token, each.logprob)))
            for each in scored
        ],
        "text_offset": [each.offset for each in scored],
    }


def _by_text(texts: TokenTexts, tokens: Iterable[tuple[int, float]]) -> dict[str, float]:
    found = dict[str, float]()
    for token, logprob in tokens:
        found.setdefault(texts(token)[0], logprob)
    return found


def chat_logprobs(texts: TokenTexts, scored: Iterable[Scored]) -> dict[str, Any]:
    """The form of chat completions: an object for each token."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text, raw = texts(token)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    content = [
        {**entry(each.token, each.logprob), "top_logprobs": [entry(*one) for one in each.top]} for each in scored
    ]
    return {"content": content, "refusal": None}
