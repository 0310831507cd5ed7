"""PUT /api, the interface of Megatron-LM's text generation server; POST is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from megalith.common.errors import MegalithError
from megalith.generation.model import TextModel
from megalith.generation.prompts import Completion
from megalith.serving.answers import ERROR_RESPONSES
from megalith.serving.disconnects import while_connected
from megalith.serving.megatron.fields import ApiRequest, body_schema, in_fields, read
from megalith.serving.service import Service
from megalith.serving.token_texts import TokenTexts

ABOUT = """\
Texts for up to 128 prompts at once, as Megatron-LM's server writes them, for clients that were written for that. Every
option of `megalith generate` may be given too, by its own name. Several results of a prompt come one after the other.

`text` has the prompt and what was written after it (with `echo` false that alone; of an encoder-decoder the answer),
without the token or the stop text that ended it. `segments` has the text of each token that was read or written, with
these and with the token that begins a text. `logprobs` has the natural logarithm of the probability of each segment
after the first, before temperature and filters; null unless asked for. `top_logprobs`, where asked for, has the
likeliest tokens at the same places, as pairs of text and logarithm. The answer of a beam search has `scores`, best
first, in place of `logprobs`.

Every mistake in a request has status 400, and `message` says what is wrong. Prompts and texts are never logged.
"""
STRINGS = {"type": "array", "items": {"type": "string"}}
NUMBERS = {"type": "array", "items": {"type": "number"}}
ANSWER = {
    "type": "object",
    "required": ["text", "segments"],
    "properties": {
        "text": STRINGS,
        "segments": {"type": "array", "items": STRINGS},
        "logprobs": {"type": ["array", "null"], "items": NUMBERS},
        "top_logprobs": {
            "type": "array",
            "items": {"type": "array", "items": {"type": "array", "items": {"type": "array"}}},
        },
        "scores": NUMBERS,
    },
    "example": {"text": ["Hello world!"], "segments": [["Hello", " world", "!"]], "logprobs": None},
}


def router(service: Service) -> APIRouter:
    """The routes."""
    routes, tokenizer = APIRouter(tags=["Megatron-LM"]), service.model.tokenizer
    texts = None if tokenizer is None else TokenTexts(tokenizer)  # no request without one gets as far as an answer

    async def api(request: Request) -> JSONResponse:
        wanted = read(await request.body(), service.options)
        params = dataclasses.replace(
            wanted.params, logprobs=wanted.logprobs,
            # an encoder predicts no token
            prompt_logprobs=wanted.logprobs and not service.model.config.decoder_layers,
        )  # fmt: skip
        try:
            submission = await service.submit(wanted.prompts, params)
        except MegalithError as error:
            raise in_fields(error) from None
        with submission:
            async with while_connected(request):
                completions = await submission.completions()
        return JSONResponse(await run_in_threadpool(_answer, service.model, texts, wanted, completions))

    for add in (routes.put, routes.post):
        add(
            "/api",
            summary="Generate text, as Megatron-LM's server does",
            description=ABOUT,
            responses={200: {"content": {"application/json": {"schema": ANSWER}}}, **ERROR_RESPONSES},
            openapi_extra={
                "requestBody": {"required": True, "content": {"application/json": {"schema": body_schema()}}}
            },
        )(api)
    return routes


def _answer(
    model: TextModel, texts: TokenTexts, wanted: ApiRequest, completions: Sequence[Completion]
) -> dict[str, Any]:  # fmt: skip
    """The answer's JSON; decoding each token by itself takes its time, in which others are served."""
    answer: dict[str, Any] = {
        "text": [each.text for each in completions],
        "segments": [[_segment(texts, token) for token in _tokens(model, each)] for each in completions],
    }
    if wanted.params.beam_width is not None:
        return answer | {"scores": [each.score for each in completions]}
    answer["logprobs"] = None
    if wanted.logprobs:
        answer["logprobs"] = [[*(each.prompt_logprobs or ()), *(each.logprobs or ())] for each in completions]
    if wanted.params.top_logprobs:
        answer["top_logprobs"] = [
            [
                [[_segment(texts, token), logprob] for token, logprob in likeliest]
                for likeliest in (*(each.prompt_top_logprobs or ()), *(each.top_logprobs or ()))
            ]
            for each in completions
        ]
    return answer


def _tokens(model: TextModel, completion: Completion) -> list[int]:
    """The tokens that a completion's log-probabilities are of, after the first."""
    return [*([model.decoder_start] if completion.answer else completion.prompt_ids), *completion.ids]


def _segment(texts: TokenTexts, token: int) -> str:
    """The text of a token; bytes that are no whole character are replacement characters, as Megatron shows them."""
    text, raw = texts(token)
    return raw.decode("utf-8", "replace") if raw else text
