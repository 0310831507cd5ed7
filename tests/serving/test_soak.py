"""A thousand requests of 64 clients, many of them broken, and a SIGTERM: every answer is right, or a clean refusal."""

import collections
import contextlib
import http.client
import json
import os
import pathlib
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import pytest

from tests.serving.plain_http import call, connect, raw
from tests.serving.server_process import tiny_model
from tests.serving.soak_plan import KINDS, MALFORMED, Action, plan

REPOSITORY = pathlib.Path(__file__).parents[2]
ACTIONS, CLIENTS, SIGTERM_AFTER, WARM_AFTER = 1000, 64, 900, 200
LIMIT = 64 * 1024  # bytes of a body
# Texts that run and wait are fewer than the clients, so that some meet a full queue.
OPTIONS = {"max_batch_size": 8, "max_waiting": 40, "max_body_bytes": LIMIT, "drain_timeout": 60.0}
GROWTH = 12 * 2**20  # of memory over 700 requests: 2 MiB were measured, and 18 kB of each request would be beyond it
ACCEPTED = 0.5  # seconds after which a request has surely left the system's queue of new connections


class Clients:
    """What the clients share: what is left to do, what they got, what was wrong."""

    def __init__(self, url: str, actions: list[Action], expected: dict):
        self.url, self.expected = url, expected
        self.left, self.lock = queue.SimpleQueue[Action](), threading.Lock()
        for action in actions:
            self.left.put(action)
        self.got, self.wrong, self.done = collections.Counter(), [], 0
        self.ending: float | None = None  # when SIGTERM was sent
        self.threads = [threading.Thread(target=self._client, daemon=True) for _ in range(CLIENTS)]

    def _client(self) -> None:
        connection = None
        with contextlib.suppress(queue.Empty):
            while True:
                action, started = self.left.get_nowait(), time.monotonic()
                try:
                    if action.kind == "good":
                        connection, outcome = self._good(connection, action)
                    else:
                        outcome = getattr(self, "_" + action.kind.replace(" ", "_"))(action)
                except Exception as error:
                    connection, outcome = None, "refused"
                    if not self._may_be_refused(error, started):
                        outcome = f"{type(error).__name__}: {error}"
                        self.wrong.append((action, outcome))
                with self.lock:
                    self.got[action.kind, outcome] += 1
                    self.done += 1

    def _may_be_refused(self, error: Exception, started: float) -> bool:
        """Whether a connection broke because the server was ending, and before it had accepted the request."""
        broken = isinstance(error, ConnectionError | http.client.BadStatusLine)
        return broken and self.ending is not None and started > self.ending - ACCEPTED

    def _check(self, action: Action, status: int, body: bytes) -> int:
        if status == 200:
            text = action.route.text(body)
            assert text == self.expected[action.text], f"{text!r} and not {self.expected[action.text]!r}"
        else:
            assert status == 429 or (status == 503 and self.ending is not None), f"status {status}: {body[:300]!r}"
            assert json.loads(body)["error"]["message"]
        return status

    def _good(self, connection: http.client.HTTPConnection | None, action: Action) -> tuple:
        """Over one connection, so that answers could be mixed up; waits and asks again where the queue is full."""
        body, route = json.dumps(action.route.body(action.text)), action.route
        for _ in range(1000):
            reused = connection is not None
            connection = connection or http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
            try:
                connection.request(route.method, route.path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
            except (ConnectionError, http.client.BadStatusLine):
                connection.close()
                connection = None
                if not reused:  # otherwise it may have been closed because it was idle
                    raise
                continue
            status = self._check(action, answer.status, answer.read())
            if status != 429:
                return connection, status
            assert int(answer.headers["Retry-After"]) >= 1
            with self.lock:
                self.got["good", 429] += 1
            time.sleep(0.1)  # less than asked for, so that the queue stays full
        raise AssertionError("the queue was always full")

    def _reads_slowly(self, action: Action) -> int:
        request = raw(
            action.route.method, action.route.path, json.dumps(action.route.body(action.text)).encode(),
            "Content-Type: application/json",
        )  # fmt: skip
        with connect(self.url, receive_buffer=2048) as connection:
            connection.sendall(request)
            time.sleep(action.chance)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            pieces = []
            while piece := answer.read(100):
                pieces.append(piece)
                time.sleep(0.01)
            return self._check(action, answer.status, b"".join(pieces))

    def _leaves(self, action: Action) -> str:
        request = raw(action.route.method, action.route.path, json.dumps(action.route.body(action.text)).encode())
        with connect(self.url) as connection:
            connection.sendall(request if action.chance < 0.7 else request[: int(action.chance * len(request))])
            time.sleep(action.chance / 20)
            if action.chance < 0.35:  # without goodbye: RST in place of FIN
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return "left"

    def _too_large(self, action: Action) -> int:
        if action.chance < 0.5:
            return self._refused(call(self.url, action.route.method, action.route.path, b"x" * (LIMIT + 1)), 413)
        with connect(self.url) as connection:
            head = f"{action.route.method} {action.route.path} HTTP/1.1\r\nHost: localhost\r\n"
            connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(LIMIT // 1024 + 1):
                connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            return self._refused((answer.status, answer.headers, answer.read()), 413)

    def _malformed(self, action: Action) -> int:
        body = MALFORMED[int(action.chance * len(MALFORMED))]
        return self._refused(call(self.url, action.route.method, action.route.path, body), 400)

    def _wrong_method(self, action: Action) -> int:
        method = ("GET", "DELETE", "PATCH")[int(action.chance * 3)]
        return self._refused(call(self.url, method, action.route.path), 405)

    def _refused(self, answer: tuple, expected: int) -> int:
        status, _, body = answer
        assert status == expected or (status == 503 and self.ending is not None), f"status {status}: {body[:300]!r}"
        assert json.loads(body)["error"]["message"]
        return status


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_soak(tokenizer_file, tmp_path):
    actions = plan(ACTIONS, texts=100, seed=16)
    model = tiny_model(tokenizer_file)
    expected = {text: text.alone(model) for text in {action.text for action in actions}}
    command = [sys.executable, "-m", "tests.serving.server_process", str(tokenizer_file), json.dumps(OPTIONS)]
    log = tmp_path / "log"
    with open(log, "w") as errors:
        server = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        url = server.stdout.readline().strip()
        assert url.startswith("http://"), log.read_text()[-3000:]
        clients = Clients(url, actions, expected)
        warm, last, slowest = _run(server, clients)
        assert server.wait(90) == 0, log.read_text()[-3000:]
    finally:
        server.kill()
        server.wait()
    print(f"{dict(clients.got)}; memory {warm >> 20} to {last >> 20} MiB; slowest /health {slowest:.3f} s")
    assert not clients.wrong, clients.wrong[:5]
    assert clients.done == ACTIONS and clients.got["good", 200] > 500 and clients.got["reads slowly", 200] > 10
    assert clients.got["good", 429] > 0  # the queue was full at times
    assert sum(clients.got[kind, how] for kind in KINDS for how in (503, "refused")) > 0  # the end was met, too
    assert last - warm < GROWTH, f"{warm >> 20} MiB after {WARM_AFTER} requests, {last >> 20} after {SIGTERM_AFTER}"
    said = log.read_text()
    assert "Traceback" not in said and "upon a time" not in said and "/v1/completions 200" in said


def _run(server: subprocess.Popen, clients: Clients) -> tuple[int, int, float]:
    """Let the clients do all that is planned: memory in bytes at both ends, and how long /health took at most."""
    warm, slowest, end = 0, 0.0, time.monotonic() + 150
    for thread in clients.threads:
        thread.start()
    while clients.done < SIGTERM_AFTER:
        assert time.monotonic() < end and server.poll() is None, f"{clients.done} done; {clients.wrong[:5]}"
        started = time.monotonic()
        assert call(clients.url, "GET", "/health")[0] == 200
        slowest = max(slowest, time.monotonic() - started)
        if clients.done >= WARM_AFTER:
            warm = warm or _memory(server.pid)
        time.sleep(0.05)
    last = _memory(server.pid)
    clients.ending = time.monotonic()
    server.send_signal(signal.SIGTERM)
    for thread in clients.threads:
        thread.join(90)
        assert not thread.is_alive()
    return warm, last, slowest


def _memory(process: int) -> int:
    """Bytes of memory that a process holds."""
    return int(pathlib.Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
