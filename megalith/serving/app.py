"""The FastAPI application: routes, what stands before them, and how errors become answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from megalith import __version__
from megalith.common.errors import MegalithError
from megalith.serving import megatron_api, observability
from megalith.serving.access_log import CLIENT_LEFT
from megalith.serving.disconnects import ClientLeft
from megalith.serving.errors import ServingError
from megalith.serving.openai import routes as openai_routes
from megalith.serving.page import routes as page_routes
from megalith.serving.security import guard
from megalith.serving.service import Service

DESCRIPTION = "Text out of a trained model: Megatron's PUT /api, and OpenAI's completions and chat completions."


def create_app(service: Service) -> FastAPI:
    """The application of a server. The service starts and ends with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield

    # FastAPI's own pages of the schema load scripts of another site; /openapi.json remains.
    app = FastAPI(
        title="megalith", version=__version__, description=DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None
    )  # fmt: skip
    app.state.service = service
    for module in (megatron_api, openai_routes, observability, page_routes):
        app.include_router(module.router(service))
    app.add_exception_handler(MegalithError, _answer)
    app.add_exception_handler(ClientLeft, _no_answer)
    service.metrics.watch(service)
    guard(app, service)
    return app


async def _no_answer(request: Request, error: Exception) -> Response:
    """For the log: nobody is there to read it."""
    return Response(status_code=CLIENT_LEFT)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    """An error as JSON: {"error": {...}} as OpenAI's, and `message` as Megatron's clients read it."""
    status = error.status if isinstance(error, ServingError) else 400
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"Retry-After": str(error.retry_after)} if getattr(error, "retry_after", None) else {}
    body = {"message": str(error), "error": {"message": str(error), "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status, headers)
