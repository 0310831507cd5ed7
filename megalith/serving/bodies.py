"""Bodies of requests, read whole before a route is called: not too large, not too slow."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeAlias

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megalith.serving.errors import ServingError, TooLarge, TooSlow, Unauthorized

BODY_SECONDS = 60.0  # for a whole body; 4 MiB come in that time at half a megabit per second
LINGER_SECONDS = 2.0  # for which the rest of a refused body is thrown away

Answer: TypeAlias = Callable[[Request, Any], Any]  # an exception handler that is awaited for its Response


class WholeBody:
    """Gives a route its request with the whole body, or answers 413 or 408."""

    def __init__(self, app: ASGIApp, limit: int, answer: Answer):
        """limit: bytes of a body."""
        self.app, self.limit, self.answer = app, limit, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ServingError as error:
            await refuse(error, self.answer, scope, receive, send)
            return
        if body is None:
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_whole() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_whole, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None where the client left."""
        declared, body = Headers(scope=scope).get("content-length", "0"), bytearray()
        self._check(int(declared))  # the parser of HTTP has refused what is no number
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while (message := await receive())["type"] == "http.request":
                    body += message.get("body", b"")
                    self._check(len(body))
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise TooSlow(f"the body did not arrive within {BODY_SECONDS:g} seconds.") from None
        return None

    def _check(self, size: int) -> None:
        if size > self.limit:
            raise TooLarge(f"the body is larger than {self.limit} bytes (--max-body-bytes); send less at a time.")


async def refuse(error: ServingError, answer: Answer, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error in place of a route, and close the connection.

    What the client still sends is read and thrown away for a while: one that sends everything before it reads would
    find a closed connection, and not the answer.
    """
    response: Response = await answer(Request(scope), error)
    response.headers["Connection"] = "close"
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"

    async def send_and_linger(message: Message) -> None:
        if message["type"] == "http.response.body":
            await send({**message, "more_body": True})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    while (await receive()).get("more_body"):
                        pass
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    await response(scope, receive, send_and_linger)
