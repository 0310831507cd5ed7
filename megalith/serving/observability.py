"""GET /health and GET /metrics: whether the server is well, and what it does. Neither waits for the engine."""

from __future__ import annotations

import time

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from megalith.serving.service import Service

TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"  # of Prometheus
STATE = {"model": "gpt2", "running": 3, "waiting": 0, "uptime_seconds": 86400.0}
OK = {"status": "ok", **STATE}
UNAVAILABLE = {"status": "unavailable", "reason": "the model has not ended a step in 300 seconds", **STATE}


def router(service: Service) -> APIRouter:
    """The two routes of a service."""
    routes, started = APIRouter(tags=["operation"]), time.monotonic()
    unavailable = {"description": "no request is taken", "content": {"application/json": {"example": UNAVAILABLE}}}

    @routes.get(
        "/health", responses={200: {"content": {"application/json": {"example": OK}}}, 503: unavailable},
        response_class=JSONResponse, summary="Whether requests are taken",
    )  # fmt: skip
    async def health() -> JSONResponse:
        """200 while the engine works or could; 503 with the reason when it is lost or hangs, and while the server ends.

        Needs no token. running, waiting: texts.
        """
        trouble, uptime = service.trouble, round(time.monotonic() - started, 3)
        state = {
            "model": service.name,
            "running": service.running,
            "waiting": service.waiting,
            "uptime_seconds": uptime,
        }
        if trouble is None:
            return JSONResponse({"status": "ok", **state})
        return JSONResponse({"status": "unavailable", "reason": trouble, **state}, 503)

    @routes.get(
        "/metrics", response_class=Response, summary="For Prometheus",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )  # fmt: skip
    async def metrics() -> Response:
        """Counts and times of requests, texts and tokens, in the text format of Prometheus. Needs the token."""
        return Response(service.metrics.text(), media_type=TEXT_FORMAT)

    return routes
