"""The answer to one request, as a whole or in chunks, in the form of completions or of chat completions."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import orjson
from starlette.concurrency import run_in_threadpool

from megalith.generation.generate import PendingCompletion
from megalith.generation.prompts import Completion
from megalith.serving.engine_thread import Update
from megalith.serving.openai.events import event
from megalith.serving.openai.logprobs import (
    Positions,
    Scored,
    chat_logprobs,
    completion_logprobs,
    continuation_scores,
    prompt_scores,
)  # fmt: skip
from megalith.serving.service import Submission
from megalith.serving.token_texts import TokenTexts


@dataclasses.dataclass(frozen=True)
class Form:
    """How answers of one kind look. whole, part: the fields of a choice, and of a piece of it, that hold a text.

    opening: of the first piece of each choice, where it has one of its own.
    """

    prefix: str
    object: str
    chunk_object: str
    whole: Callable[[str], dict[str, Any]]
    part: Callable[[str], dict[str, Any]]
    logprobs: Callable[[TokenTexts, Iterable[Scored]], dict[str, Any]]
    opening: dict[str, Any] | None = None


COMPLETION = Form(
    "cmpl", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text},
    completion_logprobs,
)  # fmt: skip
CHAT = Form(
    "chatcmpl", "chat.completion", "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"content": text} if text else {}}, chat_logprobs,
    {"delta": {"role": "assistant", "content": ""}},
)  # fmt: skip


class Answer:
    """The answer to a submission. Choices are numbered as its completions are: all of a prompt, then the next's."""

    def __init__(self, form: Form, submission: Submission, model: str, texts: TokenTexts, logprobs: bool):
        """model: its name. logprobs: whether they were asked for."""
        self.form, self.submission, self.texts, self.logprobs = form, submission, texts, logprobs
        self.head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.prompt_tokens = sum(len(prompt.prompt_ids) for prompt in submission.call.prompts)

    def whole(self, completions: Sequence[Completion]) -> bytes:
        """All texts in one JSON object."""
        choices = [
            self._choice(number, self.form.whole(each.text), self._scores(each), each.finish)
            for number, each in enumerate(completions)
        ]
        usage = self._usage(sum(len(each.ids) for each in completions))
        return orjson.dumps({**self.head, "object": self.form.object, "choices": choices, "usage": usage})

    async def events(self, usage: bool) -> AsyncIterator[bytes]:
        """The texts as they come; what came together is one chunk of each choice. usage: whether to end with it."""
        rows = {row.number: row for group in self.submission.call.rows for row in group}
        positions, written, extra = dict[int, Positions](), 0, {"usage": None} if usage else {}

        def chunk(number: int, fields: dict[str, Any], scores: Any = None, finish: str | None = None) -> bytes:
            choices = [self._choice(number, fields, scores, finish)]
            return event({**self.head, "object": self.form.chunk_object, "choices": choices, **extra})

        if opening := b"".join(chunk(number, fields) for number, row in rows.items() if (fields := self._opening(row))):
            yield opening
        async for updates in self.submission:
            chunks = list[bytes]()
            for number, group in _by_number(updates).items():
                row, text, scores = rows[number], "".join(update.text for update in group), list[Scored]()
                if self.logprobs and number not in positions:
                    positions[number] = Positions(self.texts.tokenizer, row.completion)
                    if _echoes(row.completion):
                        scores += await run_in_threadpool(prompt_scores, self.texts.tokenizer, row.completion)
                        text = row.completion.prompt + text
                tokens = [update for update in group if update.token is not None]
                written += len(tokens)
                if self.logprobs:
                    scores += [positions[number].score(each.token, each.logprob, each.top_logprobs) for each in tokens]
                finish = row.completion.finish if group[-1].done else None
                if finish:
                    del rows[number]
                if text or scores or finish:
                    chunks.append(chunk(number, self.form.part(text), scores if self.logprobs else None, finish))
            if chunks:
                yield b"".join(chunks)
        for number, row in rows.items():  # of which nothing was asked for
            yield chunk(number, self.form.part(""), finish=row.completion.finish)
        if usage:
            yield event({
                **self.head, "object": self.form.chunk_object, "choices": [], "usage": self._usage(written)
            })  # fmt: skip

    def _opening(self, row: PendingCompletion) -> dict[str, Any] | None:
        """What can be said before the model has said anything: an echoed prompt, unless its tokens are to be scored."""
        if self.form.opening is not None or self.logprobs or not _echoes(row.completion):
            return self.form.opening
        return self.form.part(row.completion.prompt)

    def _choice(
        self, number: int, fields: dict[str, Any], scores: Sequence[Scored] | None, finish: str | None
    ) -> dict[str, Any]:
        logprobs = None if scores is None else self.form.logprobs(self.texts, scores)
        return {"index": number, **fields, "logprobs": logprobs, "finish_reason": finish}

    def _scores(self, completion: Completion) -> list[Scored] | None:
        if not self.logprobs:
            return None
        prompt = prompt_scores(self.texts.tokenizer, completion) if _echoes(completion) else []
        return prompt + continuation_scores(self.texts.tokenizer, completion)

    def _usage(self, written: int) -> dict[str, int]:
        prompt = self.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _echoes(completion: Completion) -> bool:
    return completion.echo and not completion.answer


def _by_number(updates: Iterable[Update]) -> dict[int, list[Update]]:
    grouped = dict[int, list[Update]]()
    for update in updates:
        grouped.setdefault(update.number, []).append(update)
    return grouped
