"""Plain HTTP requests, as no well-behaved client sends them, and an engine that stands still."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from megalith.serving.service import Service


def call(
    url: str, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """One request on a connection of its own: status, headers, body. body: bytes, or what is sent as JSON."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    with contextlib.closing(connection):
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, {"Content-Type": "application/json", **given})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    """A bare connection. receive_buffer: bytes that the system takes from the server before anybody reads them."""
    connection = socket.socket()
    connection.settimeout(30)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((urlsplit(url).hostname, urlsplit(url).port))
    return connection


def raw(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """The bytes of a request."""
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@contextlib.contextmanager
def held(service: Service) -> Iterator[None]:
    """Within the block the engine's steps do not end."""
    go_on, step = threading.Event(), service.engine.step

    def wait_and_step() -> Any:
        assert go_on.wait(60)
        return step()

    service.engine.step = wait_and_step
    try:
        yield
    finally:
        service.engine.step = step
        go_on.set()
