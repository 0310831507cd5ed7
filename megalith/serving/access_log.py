"""A line for each request: who, what, how it ended, how long it took, how many tokens. Never a text or a secret."""

from __future__ import annotations

import contextvars
import dataclasses
import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megalith.serving.answers import CLIENT_CLOSED
from megalith.serving.metrics import Metrics

LOG = logging.getLogger("megalith.serving")
PROBES = ("/health", "/metrics")  # asked every few seconds, so their lines are for debugging
LOGGING: dict[str, Any] = {  # for uvicorn's log_config
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        "megalith.serving": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}


@dataclasses.dataclass
class Tokens:
    """How many tokens a request has had read and written."""

    prompt: int = 0
    new: int = 0


tokens_of_request = contextvars.ContextVar[Tokens]("tokens_of_request")  # of the request that this task answers


def count_tokens() -> Tokens:
    """The counts of the request that is answered in this context; outside of one, counts that nobody reads."""
    return tokens_of_request.get(Tokens())


class AccessLog:
    """Logs each request when it has ended, and counts it in the metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, complete, tokens = time.monotonic(), CLIENT_CLOSED, False, Tokens()
        tokens_of_request.set(tokens)  # each request has a task, and so a context, of its own

        async def watched(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            if not complete and status < 500:
                status = CLIENT_CLOSED  # in mid-stream, whatever the stream began with
            seconds = time.monotonic() - started
            self.metrics.request(getattr(scope.get("route"), "path", "other"), status, seconds)
            _log(scope, status, seconds, tokens)


def _log(scope: Scope, status: int, seconds: float, tokens: Tokens) -> None:
    level = logging.WARNING if status in (401, 403) or status >= 500 else logging.INFO
    if scope["path"] in PROBES and level == logging.INFO:
        level = logging.DEBUG
    # The path as it was sent, so that an encoded line break in it cannot forge a line. Queries may hold anything.
    path = scope.get("raw_path", b"").decode("latin-1")[:200]
    LOG.log(
        level, "%s %s %s %d %.3f s, %d prompt tokens, %d new", (scope.get("client") or ["-"])[0], scope["method"], path,
        status, seconds, tokens.prompt, tokens.new,
    )  # fmt: skip
