"""Chats and completions as tokens, and which of them are trained: those that the assistant writes, with the turn's end.

The tokens are those that a server makes of the same chat (transformers: apply_chat_template). What the assistant writes
is found in the text, as characters, and then in the tokens: a token is trained where it holds any of these characters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.config.flags.text import Words
from megalith.data.instructions.records import Chat, Completion
from megalith.data.tokenizers.chat_template import ChatTemplate
from megalith.data.tokenizers.tokenizer import Tokenizer

PROBE = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."})
Span = tuple[int, int]  # characters, or tokens, [begin, end)
MARK_IT = "mark what the assistant writes by {% generation %} and {% endgeneration %}, and name the template with "
MARK_IT += "--chat-template FILE"


class Encoded(NamedTuple):
    """A sample. ids: int32 [n]. trained: bool [n], whether the model is to write this token."""

    ids: np.ndarray
    trained: np.ndarray


class Encoder(Protocol):
    """Makes samples of records of one kind."""

    def encode(self, records: Sequence[Any]) -> Iterator[Encoded | str]:
        """A sample of each record in order, or why it cannot be used."""


class TemplateError(DataError):
    """The template is at fault, and not the chat. number: of the chat among those that were given."""

    def __init__(self, message: str, number: int = 0):
        super().__init__(message)
        self.number = number


class _Refused(Exception):
    """The template does not take this chat."""


def special_tokens(template: ChatTemplate) -> set[int]:
    """The ids of the tokenizer's special tokens."""
    return {number for number, token in template.backend.get_added_tokens_decoder().items() if token.special}


def turn_end(template: ChatTemplate) -> int | None:
    """The special token with which the template ends a turn of the assistant; None where it writes none."""
    try:
        text = template.render(PROBE, {}, prompt=False)
    except DataError:  # it wants more than the two turns; then the data show it
        return None
    encoding = template.backend.encode(text, add_special_tokens=False)
    after = text.rfind(PROBE[1]["content"]) + len(PROBE[1]["content"])
    special = special_tokens(template)
    found = (i for i, (begin, _) in zip(encoding.ids, encoding.offsets) if begin >= after and i in special)
    return next(found, None)


@dataclasses.dataclass(frozen=True)
class ChatEncoder:
    """Chats through a template. end: the token that ends a turn.

    assistant_only: False trains every token but those of the assistant's turns that are not to be learned.
    """

    template: ChatTemplate
    end: int
    assistant_only: bool = True

    def encode(self, records: Sequence[Chat]) -> Iterator[Encoded | str]:
        """A sample of each chat in order, or why the template does not take it.

        Raises TemplateError where the template is at fault, and not the chat.
        """
        found = list[tuple[str, list[Span]] | str]()
        for number, chat in enumerate(records):
            try:
                found.append(self._text_and_spans(chat))
            except _Refused as error:
                found.append(str(error))
            except TemplateError as error:
                raise TemplateError(str(error), number) from None
        texts = [each[0] for each in found if not isinstance(each, str)]
        encodings = iter(self.template.backend.encode_batch(texts, add_special_tokens=False))
        for number, each in enumerate(found):
            if isinstance(each, str):
                yield each
                continue
            try:
                yield self._encoded(*each, next(encodings))
            except TemplateError as error:
                raise TemplateError(str(error), number) from None

    def _text_and_spans(self, chat: Chat) -> tuple[str, list[Span]]:
        """The text of a chat, and the characters of what is trained; where prompts are, too, of what is not."""
        if not self.assistant_only and all(chat.trained):
            return self._render(chat.messages, chat.variables, prompt=False), []
        if self.template.has_marks:
            try:
                text, spans = self.template.render_marked(chat.messages, chat.variables)
            except DataError as error:
                raise _Refused(str(error)) from None
        else:
            text, spans = self._by_prefixes(chat)
        if not any(begin < end for begin, end in spans):
            what, rule = "The chat template", "must mark what the assistant writes, in every chat that has such a turn"
            raise TemplateError(problem(what, Words(f"no mark in {_shown(text)}"), rule, f"To cure it, {MARK_IT}"))
        if len(spans) == len(chat.trained):
            spans = [span for span, trained in zip(spans, chat.trained) if trained == self.assistant_only]
        elif not all(chat.trained):
            found = Words(f"{len(spans)} marks for {len(chat.trained)} turns in {_shown(text)}")
            rule = "must mark each turn of the assistant once, where some of them have weight 0"
            cure = "Correct the template, or leave the weights out"
            raise TemplateError(problem("The chat template", found, rule, cure))
        return text, spans

    def _by_prefixes(self, chat: Chat) -> tuple[str, list[Span]]:
        """Each turn of the assistant is what is longer than the prompt before it, in a text that begins alike.

        To prove that a text begins as its prompts do, each prompt is rendered, which is quadratic in turns. Marks are
        linear.
        """
        text, spans = self._render(chat.messages, chat.variables, prompt=False), list[Span]()
        for number, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            before = self._render(chat.messages[:number], chat.variables, prompt=True)
            after = self._render(chat.messages[: number + 1], chat.variables, prompt=False)
            for beginning, whole in ((before, after), (after, text)):
                if not whole.startswith(beginning):
                    rule = "must write a chat so that it begins as the same chat with fewer turns does, or mark turns"
                    found = Words(f"{_shown(beginning)}, and with more turns {_shown(whole)}")
                    raise TemplateError(problem("The chat template", found, rule, f"To cure it, {MARK_IT}"))
            spans.append((len(before), len(after)))
        return text, spans

    def _render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], prompt: bool) -> str:
        try:
            return self.template.render(messages, variables, prompt=prompt)
        except DataError as error:
            raise _Refused(str(error)) from None

    def _encoded(self, text: str, spans: Sequence[Span], encoding: Any) -> Encoded:
        ids, offsets = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)
        trained, ended = np.full(len(ids), not self.assistant_only), False
        for first, last in spans:
            (inside,) = np.nonzero((offsets[:, 0] < last) & (offsets[:, 1] > first))
            if not len(inside):
                continue
            begin, stop = int(inside[0]), int(inside[-1]) + 1
            stop, complete = self._with_end(text, ids, offsets, begin, stop)
            ended = ended or complete
            trained[begin:stop] = self.assistant_only
        if self.assistant_only and not ended:
            token = self.template.backend.id_to_token(self.end)
            rule = f"must end a turn of the assistant with {token}, at which generation stops"
            cure = "Write {{ eos_token }} behind the assistant's content, and name the template with --chat-template"
            raise TemplateError(problem("The chat template", Words(_shown(text)), rule, cure))
        return Encoded(ids, trained)

    def _with_end(self, text: str, ids: np.ndarray, offsets: np.ndarray, begin: int, stop: int) -> tuple[int, bool]:
        """Where the tokens of a turn stop, just behind its end token, and whether it has one.

        A mark may leave the end out; then it is the next token but for white space. Prefixes bring what is behind it.
        """
        (inside,) = np.nonzero(ids[begin:stop] == self.end)
        if len(inside):
            return begin + int(inside[-1]) + 1, True
        (after,) = np.nonzero(ids[stop:] == self.end)
        if len(after) and not text[offsets[stop - 1, 1] : offsets[stop + int(after[0]), 0]].strip():
            return stop + int(after[0]) + 1, True
        return stop, int(ids[stop - 1]) in special_tokens(
            self.template
        )  # as of a call of a tool (Llama 3.1: <|eom_id|>)


class CompletionEncoder:
    """Prompts and answers as they are, without a template: the prompt, the answer, and the token that ends a text."""

    def __init__(self, tokenizer: Tokenizer, *, decoder: bool = False, assistant_only: bool = True):
        """decoder: the answer is a decoder's text, apart from the prompt, which an encoder reads.

        Raises DataError where the tokenizer has no token that ends a text.
        """
        self.tokenizer, self.decoder, self.assistant_only = tokenizer, decoder, assistant_only
        self.end = tokenizer.require("eos" if decoder else "eod")
        # What the tokenizer adds to every text
        self.prefix = list(getattr(tokenizer, "prefix", tokenizer.encode("")))
        self.suffix = list(getattr(tokenizer, "suffix", ()))

    def encode(self, records: Sequence[Completion]) -> Iterator[Encoded | str]:
        """A sample of each prompt with its answer, in order."""
        prompts = self.tokenizer.encode_batch([each.prompt for each in records])
        answers = self.tokenizer.encode_batch([each.answer for each in records])
        texts = [] if self.decoder else [each.prompt + each.answer for each in records]
        joined = self.tokenizer.encode_batch(texts) or prompts
        for prompt, answer, both in zip(prompts, answers, joined, strict=True):
            answer = self._bare(answer)[len(self.prefix) :]
            if not self.decoder:
                prompt, both = self._bare(prompt), self._bare(both)
                # Together they may be other tokens than apart (a space that a word begins with). Where the prompt's
                # are the same, as in generation, the answer's are those that follow them.
                if np.array_equal(both[: len(prompt)], prompt):
                    answer = both[len(prompt) :]
                prompt = prompt if len(prompt) else np.array([self.end])  # as generation begins without a prompt
            ids = np.concatenate((prompt, answer, [self.end])).astype(np.int32)
            trained = np.arange(len(ids)) >= (len(prompt) if self.assistant_only else 0)
            yield Encoded(ids, trained)

    def _bare(self, ids: np.ndarray) -> np.ndarray:
        return ids[: len(ids) - len(self.suffix)]


def _shown(text: str, most: int = 600) -> str:
    return repr(text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}")
