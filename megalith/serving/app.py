"""The FastAPI application: routes, and what stands before them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from megalith import __version__
from megalith.serving import observability
from megalith.serving.answers import add_error_handlers
from megalith.serving.megatron import routes as megatron_routes
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
        await service.stop()

    # FastAPI's own pages of the schema load scripts of another site; /openapi.json remains.
    app = FastAPI(
        title="megalith", version=__version__, description=DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None
    )  # fmt: skip
    app.state.service = service
    for module in (megatron_routes, openai_routes, observability, page_routes):
        app.include_router(module.router(service))
    add_error_handlers(app)
    service.metrics.watch(service)
    guard(app, service)
    return app
