"""POST /v1/completions and /v1/chat/completions, GET /v1/models."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from megalith.common.errors import ConfigError, DataError, MegalithError
from megalith.data.tokenizers.chat_template import ChatTemplate
from megalith.generation.model import most_positions
from megalith.generation.params import GenerationParams
from megalith.generation.prompts import Prompts
from megalith.serving.answers import ERROR_RESPONSES, check_model
from megalith.serving.disconnects import while_connected
from megalith.serving.errors import BadRequest
from megalith.serving.openai.answer import CHAT, COMPLETION, Answer, Form
from megalith.serving.openai.events import EventStream
from megalith.serving.openai.models import ChatAnswer, CompletionAnswer, ServedModel, ServedModels
from megalith.serving.openai.requests import ChatRequest, CompletionRequest, Options, in_fields
from megalith.serving.service import Service
from megalith.serving.token_texts import TokenTexts

DEFAULT_MAX_TOKENS = 16  # OpenAI's, of completions
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}  # each by itself
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A JSON object; with stream server-sent events, the last of them [DONE]",
        "content": {"text/event-stream": {"schema": EVENT}},
    }
}


def router(service: Service) -> APIRouter:
    """The routes of a service."""
    routes, openai = APIRouter(tags=["OpenAI"]), OpenAI(service)

    @routes.post("/v1/completions", response_model=CompletionAnswer, responses={**STREAMED, **ERROR_RESPONSES})
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue prompts."""
        return await openai.completions(request, body)

    @routes.post("/v1/chat/completions", response_model=ChatAnswer, responses={**STREAMED, **ERROR_RESPONSES})
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Write the next message of a chat, by the chat template of the model's tokenizer."""
        return await openai.chat(request, body)

    @routes.get("/v1/models", responses=ERROR_RESPONSES)
    async def models() -> ServedModels:
        """The model that is served."""
        return ServedModels(object="list", data=[openai.model()])

    @routes.get("/v1/models/{name:path}", responses=ERROR_RESPONSES)
    async def model(name: str) -> ServedModel:
        """The model of this name."""
        check_model(name, service.name)
        return openai.model()

    return routes


class OpenAI:
    """What the routes do."""

    def __init__(self, service: Service):
        """service: whose model it is."""
        self.service, self.template = service, ChatTemplate.of(service.model.tokenizer)

    @functools.cached_property
    def texts(self) -> TokenTexts:
        """The texts of the model's tokens. Raises ConfigError where it has no tokenizer."""
        if self.service.model.tokenizer is None:
            raise ConfigError("this model has no tokenizer, so it has no text: serve it with one (--tokenizer).")
        return TokenTexts(self.service.model.tokenizer)

    def model(self) -> ServedModel:
        """The model as /v1/models shows it."""
        return ServedModel(
            id=self.service.name, object="model", created=self.service.created, owned_by="megalith",
            max_model_len=self.service.engine.max_length, chat_template=self.template is not None,
        )  # fmt: skip

    async def completions(self, request: Request, body: CompletionRequest) -> Response:
        """The answer of /v1/completions."""
        check_model(body.model, self.service.name)
        most = DEFAULT_MAX_TOKENS if body.most_tokens is None else body.most_tokens
        wanted, echo = body.logprobs is not None, bool(body.echo)
        params = body.params(
            self.service.options, most, echo=echo, logprobs=wanted, top_logprobs=body.logprobs or 0,
            prompt_logprobs=wanted and echo and not self.service.model.config.decoder_layers,
        )  # fmt: skip
        return await self._answer(request, body, COMPLETION, body.prompt, params)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """The answer of /v1/chat/completions."""
        check_model(body.model, self.service.name)
        if self.template is None:
            raise BadRequest("this model's tokenizer has no chat template: use /v1/completions, with a text as prompt.")
        messages = [message.for_template() for message in body.messages]
        try:
            ids = await run_in_threadpool(self.template.encode, messages, body.chat_template_kwargs or {})
        except DataError as error:
            raise BadRequest(str(error), param="messages") from None
        most = self._room(len(ids)) if body.most_tokens is None else body.most_tokens
        params = body.params(
            self.service.options, most, echo=False, logprobs=bool(body.logprobs), top_logprobs=body.top_logprobs or 0
        )
        return await self._answer(request, body, CHAT, [ids], params)

    def _room(self, prompt: int) -> int:
        """How many new tokens fit after a prompt of so many; at least 1, so that one that is too long is refused."""
        config, length = self.service.model.config, self.service.engine.max_length
        length = min(length, most_positions(config) or length)
        return max(length - (1 if config.decoder_layers else prompt), 1)

    async def _answer(
        self, request: Request, body: Options, form: Form, prompts: Prompts, params: GenerationParams
    ) -> Response:
        texts = self.texts
        try:
            submission = await self.service.submit(prompts, params)
        except MegalithError as error:
            raise in_fields(error) from None
        answer = Answer(form, submission, self.service.name, texts, params.logprobs)
        if body.stream:
            with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return EventStream(request, submission, answer.events(with_usage))
        with submission:
            async with while_connected(request):
                completions = await submission.completions()
        if params.logprobs:  # the places of a long prompt's tokens take a while
            content = await run_in_threadpool(answer.whole, completions)
        else:
            content = answer.whole(completions)
        return Response(content, media_type="application/json")
