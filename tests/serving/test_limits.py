"""Full queues, slow and large bodies, slow readers, clients that leave: each costs its own request, and no other."""

import asyncio
import json
import math
import threading
import time

import pytest
import uvicorn

from megalith.serving import bodies, connections
from tests.serving.conftest import serving
from tests.serving.plain_http import call, connect, held, raw, until

BODY = {"prompts": ["Once upon"], "tokens_to_generate": 100}
RAW = raw("PUT", "/api", json.dumps(BODY).encode())


def idle(service):
    """Wait until nothing is left of any text."""
    until(lambda: service.unfinished == 0 and not service.engine.busy and service.local_engine.bytes_in_use == 0)


def test_a_full_queue(make):
    with serving(make(), max_batch_size=1, max_waiting=1) as (url, service):
        service.metrics.durations.extend([5.0, 7.0])  # seconds that texts took
        with held(service):
            clients = [connect(url) for _ in range(2)]
            for number, client in enumerate(clients, 1):
                client.sendall(RAW)
                until(lambda: service.unfinished == number)  # noqa: B023
            assert (service.running, service.waiting) == (1, 1)
            status, headers, body = call(url, "PUT", "/api", BODY)
            assert status == 429 and "--max-waiting" in json.loads(body)["message"]
            assert int(headers["Retry-After"]) == math.ceil(6.0 / 2)
            assert service.unfinished == 2
        for client in clients:
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        assert call(url, "PUT", "/api", BODY)[0] == 200


def test_too_many_texts_in_one_request(served):
    url, service = served
    status, _, body = call(url, "PUT", "/api", {"prompts": ["a"] * 1025, "tokens_to_generate": 1})
    assert status == 400 and service.metrics.texts._value.get() == 0, body


def test_a_request_that_takes_too_long(make):
    with serving(make(), request_timeout=0.2) as (url, service):
        with held(service):
            status, _, body = call(url, "PUT", "/api", BODY)
            assert status == 504 and "--request-timeout" in json.loads(body)["message"]
            assert service.unfinished == 0
        idle(service)
        assert service.metrics.cancelled_texts._value.get() == 1


def test_a_client_that_leaves(make):
    with serving(make(), max_batch_size=1) as (url, service):
        with held(service):
            client = connect(url)
            client.sendall(RAW)
            until(lambda: service.unfinished == 1)
            client.close()
            until(lambda: service.unfinished == 0, 1.0)  # the engine is not asked
        idle(service)
        assert service.metrics.new_tokens._value.get() < 100
        assert call(url, "PUT", "/api", BODY)[0] == 200


@pytest.mark.parametrize("how", ["declared", "chunked", "all sent"])
def test_large_bodies(make, how):
    with serving(make(), max_body_bytes=1000) as (url, service):
        if how == "all sent":  # one that sends everything before it reads gets the answer too, and no closed connection
            status, _, body = call(url, "PUT", "/api", b"x" * 20_000_000)
            assert status == 413 and "--max-body-bytes" in json.loads(body)["message"]
        else:
            header = "Content-Length: 1001" if how == "declared" else "Transfer-Encoding: chunked"
            with connect(url) as client:
                client.sendall(f"PUT /api HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode())
                for _ in range(0 if how == "declared" else 3):  # a declared one is refused before it is there
                    client.sendall(b"190\r\n" + b"x" * 400 + b"\r\n")
                assert client.recv(1000).startswith(b"HTTP/1.1 413")
        fits = json.dumps(BODY).encode().ljust(1000)
        assert call(url, "PUT", "/api", fits)[0] == 200
        assert service.metrics.texts._value.get() == 1


def test_slow_clients(served, monkeypatch):
    url, service = served
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(bodies, "LINGER_SECONDS", 0.2)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    slow_body, slow_head, silent, large_head = (connect(url) for _ in range(4))
    slow_body.sendall(RAW[:-5])
    slow_head.sendall(b"PUT /api HTTP/1.1\r\nHost: loc")
    large_head.sendall(b"PUT /api HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (connections.HEAD_BYTES + 1))
    assert call(url, "GET", "/health")[0] == 200
    assert slow_body.recv(1000).startswith(b"HTTP/1.1 408")
    assert slow_head.recv(1000) == silent.recv(1000) == b""
    assert large_head.recv(1000).startswith(b"HTTP/1.1 431")
    assert service.unfinished == 0


def test_a_large_head_while_an_earlier_request_is_answered(served):
    """One after an answered request may come before the answer; it has the limit of all heads."""
    url, service = served
    with held(service), connect(url) as client:
        client.sendall(RAW)
        until(lambda: service.unfinished == 1)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        client.sendall(b"x" * (connections.HEAD_BYTES + 1))
        until(lambda: service.unfinished == 0, 5.0)  # the connection is gone, and so is its request
    with connect(url) as client:  # smaller ones are answered in their order
        client.sendall(RAW + raw("GET", "/health", b"", "X: " + "x" * 30000, "Connection: close"))
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.count(b"HTTP/1.1 200 OK") == 2 and b'"text"' in answer and b'"uptime_seconds"' in answer


def test_connections_live_on_between_requests(served, monkeypatch):
    url, _ = served
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)  # counts from the first byte of a head
    client = connect(url)
    for _ in range(2):
        client.sendall(raw("GET", "/health"))
        answer = b""
        while b'"ok"' not in answer:  # head and body may come one after the other
            piece = client.recv(2000)
            assert piece
            answer += piece
        time.sleep(0.3)


def test_slow_readers(monkeypatch):
    """An answer that nobody reads is written no further, holds up nobody, and is given up."""
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.5)
    written, ended, piece, limit = 0, threading.Event(), b"x" * 65536, 1000

    async def client_left(receive):
        while (await receive())["type"] != "http.disconnect":
            pass

    async def app(scope, receive, send):
        nonlocal written
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/endless":
            left = asyncio.create_task(client_left(receive))
            while written < limit and not left.done():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                written += 1
                await asyncio.sleep(0)
            ended.set()
        await send({"type": "http.response.body", "body": b"ok"})

    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="warning", access_log=False, lifespan="off", http=connections.Connection)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        reader = connect(url, receive_buffer=4096)
        reader.sendall(raw("GET", "/endless"))
        until(lambda: written > 0)
        time.sleep(0.2)
        stalled_at = written
        assert stalled_at < limit  # at most what the system's buffers take
        assert call(url, "GET", "/")[2] == b"ok"
        assert written == stalled_at
        assert ended.wait(5) and written <= stalled_at + 3
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()
