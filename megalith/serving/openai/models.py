"""The forms of OpenAI's answers, as /openapi.json describes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class Usage(BaseModel):
    """Numbers of tokens: each prompt counts once, whatever n is; those that ended a text count."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Of each token: its text (bytes:\\xe6 where it is no whole characters), its natural log-probability before
    penalties and temperature, the likeliest tokens with theirs, and where its text begins, in characters of `text`.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(BaseModel):
    """The answer of /v1/completions that is not streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class AnswerMessage(BaseModel):
    """What the model wrote."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One message. logprobs: `content` has an object for each token: token, logprob, bytes, top_logprobs."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """The answer of /v1/chat/completions that is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ServedModel(BaseModel):
    """The model. max_model_len: most tokens of a prompt and its text together. chat_template: whether it has one."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    chat_template: bool


class ServedModels(BaseModel):
    """The models of this server: one."""

    object: Literal["list"]
    data: list[ServedModel]
