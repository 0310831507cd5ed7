"""Server-sent events: an answer that is sent piece by piece, until it ends, fails, or its reader leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from megalith.common.errors import MegalithError
from megalith.serving.answers import error_body
from megalith.serving.disconnects import ClientLeft, while_connected
from megalith.serving.service import Submission

KEEP_ALIVE = 15.0  # seconds without an event after which a comment is sent; proxies give up after 30 to 60
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would gather what it passes on


def event(content: dict[str, Any]) -> bytes:
    """One event; numbers that JSON does not have become null."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


class EventStream(StreamingResponse):
    """The events of a submission. One that fails ends with an error, and without [DONE]."""

    media_type = "text/event-stream"

    def __init__(self, request: Request, submission: Submission, events: AsyncIterator[bytes]):
        """submission: one that nobody has entered yet. events: made from it."""
        super().__init__(self._all(events), headers=HEADERS)
        self.request, self.submission, self.sent = request, submission, time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events. The submission is given up where the client leaves, whatever is being waited for."""

        async def send_now(message: Any) -> None:
            self.sent = time.monotonic()
            await send(message)

        with contextlib.suppress(ClientLeft), self.submission:
            async with while_connected(self.request):
                comments = asyncio.create_task(self._keep_alive(send_now))
                try:
                    await self.stream_response(send_now)
                finally:
                    comments.cancel()

    async def _all(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for each in events:
                yield each
        except MegalithError as error:
            yield event(error_body(error))
        except Exception as error:  # its status has been sent, so that this is all that the client can learn
            logging.getLogger(__name__).exception("a streamed answer has failed")
            yield event(error_body(error))
        else:
            yield DONE

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await asyncio.sleep(max(self.sent + KEEP_ALIVE - time.monotonic(), 0.0))
            if time.monotonic() >= self.sent + KEEP_ALIVE:
                await send({"type": "http.response.body", "body": b": still at work\n\n", "more_body": True})
