"""Who may use a server: the token, pages of other sites, and names that a browser was tricked into believing.

In the order in which a request meets them (all are pure ASGI, so that streams and disconnects pass through):

1. AccessLog: a line and the metrics of each request, of refused ones too.
2. SameSite: 403 for a Host or an Origin that is not this server's; headers for browsers on every answer.
3. CORSMiddleware, only with --allow-origins: preflights, and the headers by which these origins may read answers.
4. TokenRequired, only with --token-file: 401 without the token. Free are /health, which load balancers ask, and the
   page's own files, because a browser cannot send a token with them. /metrics and /openapi.json need it.
5. WholeBody: 413 and 408.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megalith.common.errors import MegalithError
from megalith.serving.access_log import AccessLog
from megalith.serving.bodies import Answer, WholeBody, refuse
from megalith.serving.errors import Forbidden, Unauthorized
from megalith.serving.options import is_loopback
from megalith.serving.service import Service
from megalith.serving.token_file import read_token

# A pattern of paths that need no token ends with *.
FREE = ("/", "/health", "/favicon.ico", "/page/*")
BROWSER_HEADERS = {
    # Nothing but this server's own files: text of a model that looks like HTML or a script cannot become one.
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # for browsers without frame-ancestors
}


def guard(app: FastAPI, service: Service) -> None:
    """Put all of the above before an application's routes; it must have its handler of MegalithErrors."""
    options, answer = service.options, app.exception_handlers[MegalithError]
    app.add_middleware(WholeBody, limit=options.max_body_bytes, answer=answer)  # the last added is the first met
    if options.token_file is not None:
        app.add_middleware(TokenRequired, token=read_token(options.token_file), answer=answer)
    if options.allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.allow_origins, allow_methods=["GET", "POST", "PUT"],
            allow_headers=["*"], expose_headers=["Retry-After"], allow_private_network=True,
        )  # fmt: skip
    app.add_middleware(SameSite, host=options.host, origins=options.allow_origins, answer=answer)
    app.add_middleware(AccessLog, metrics=service.metrics)


class SameSite:
    """Refuses requests that a browser sends for a page of another site, and those for another host's name.

    A browser sends some POSTs of any page without asking this server first, and a name of another site may lead to this
    machine's loopback (DNS rebinding); so both are checked before a request does anything.
    """

    def __init__(self, app: ASGIApp, host: str, origins: tuple[str, ...], answer: Answer):
        """host: where the server listens. origins: of other sites that may use it; their hosts are its names too, as
        behind a proxy.
        """
        self.app, self.origins, self.answer = app, origins, answer
        named = {urlsplit(origin).hostname for origin in origins if "://" in origin}
        names = {"localhost", "127.0.0.1", "::1", host.lower(), *named}
        # Beyond loopback the machine may have any name, which only the token protects.
        self.names = names if is_loopback(host) and "*" not in origins else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(BROWSER_HEADERS)
            await send(message)

        if error := self._problem(Headers(scope=scope)):
            await refuse(error, self.answer, scope, receive, with_headers)
        else:
            await self.app(scope, receive, with_headers)

    def _problem(self, headers: Headers) -> Forbidden | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if host and self.names is not None and _hostname(f"//{host}") not in self.names:  # browsers always send it
            cure = "Use http://localhost, or name its origin by --allow-origins"
            return Forbidden(f"this server is only for its own machine, and not for the host {host[:200]!r}. {cure}.")
        if origin is None or origin in self.origins or "*" in self.origins:
            return None
        if origin.lower().partition("://")[2] == host.lower():
            return None
        cure = "Where they should, start it with --allow-origins and this origin"
        return Forbidden(f"pages of {origin[:200]!r} may not use this server. {cure}.")


class TokenRequired:
    """Refuses requests without the token: `Authorization: Bearer TOKEN`."""

    def __init__(self, app: ASGIApp, token: str, answer: Answer):
        self.app, self.token, self.answer = app, token.encode(), answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_free(scope) or self._has_token(scope):
            await self.app(scope, receive, send)
            return
        rule = "this server needs its token: send the header 'Authorization: Bearer TOKEN'"
        await refuse(Unauthorized(f"{rule} with the line of its --token-file."), self.answer, scope, receive, send)

    def _has_token(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        return hmac.compare_digest(token.strip(), self.token) and scheme.lower() == b"bearer"


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # brackets that hold no address
        return None


def _is_free(scope: Scope) -> bool:
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and any(
        path.startswith(free[:-1]) if free.endswith("*") else path == free for free in FREE
    )
