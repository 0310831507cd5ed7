"""A server as a process: its signals, its exit statuses, and what its clients get meanwhile."""

import pathlib
import signal
import socket
import time

import pytest

from megalith.common.errors import ConfigError
from megalith.generation.generate import complete
from megalith.generation.load import load
from megalith.serving.options import ServeOptions
from megalith.serving.server import bind, serve_model
from tests.serving.plain_http import call, until
from tests.serving.server_processes import LONG, TEXT, saved, server

# Python that makes the engine fail, or stand still, after a few steps.
BROKEN = """
import itertools, time
from megalith.generation.engine import Engine
steps, step = itertools.count(), Engine.step
def broken(self):
    if next(steps) > 5:
        {}
    return step(self)
Engine.step = broken
"""
SHORT = {**TEXT, "tokens_to_generate": 600}


@pytest.fixture
def folder(tokenizer, tmp_path: pathlib.Path) -> pathlib.Path:
    return saved(tokenizer, tmp_path)


def test_an_address_that_is_taken_or_not_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--host and --port must be .*; found '127.0.0.1:{port}'\. Try another"):
            bind("127.0.0.1", port)
    for host in ("no such host.invalid", "192.0.2.1"):
        with pytest.raises(ConfigError, match="must be an address of this machine"):
            bind(host, 0)
    with bind("::1", 0) as six, bind("localhost", 0) as four:
        assert six.getsockname()[1] != four.getsockname()[1]


def test_a_length_beyond_the_models_context(make) -> None:
    model = make()
    limit = model.config.max_position_embeddings
    with pytest.raises(ConfigError, match=f"--max-length must be at most {limit}, .*; found {limit + 1}"):
        serve_model(model, "tiny", ServeOptions(port=0, max_length=limit + 1))


@pytest.mark.slow
def test_a_signal_lets_running_texts_end(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with server(folder, tmp_path / "log") as one:
        assert one.put()[0] == 200
        running = one.start(SHORT)
        one.process.send_signal(signal.SIGTERM)
        until(lambda: call(one.url, "GET", "/health")[0] == 503)
        status, headers, body = one.put()
        assert status == 503 and "is ending" in body["message"]
        assert int(headers["Retry-After"]) > 0 and headers["Connection"] == "close"
        assert one.wait(60) == 0
        running.join(10)
    options = {"top_k": 1, "max_new_tokens": 600, "stop_at_eod": False}
    expected = complete(load(folder, device="cpu"), TEXT["prompts"], **options)
    assert running.status == 200 and running.answer["text"] == [each.text for each in expected]
    said = one.said()
    assert "ends when its texts are complete, now 2" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_drain_has_an_end_and_a_second_signal_is_one(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with server(folder, tmp_path / "log", "--drain-timeout=1") as one:
        running, start = one.start(LONG), time.monotonic()
        one.process.send_signal(signal.SIGINT)
        assert one.wait(30) == 0 and time.monotonic() - start > 1
        running.join(10)
        assert running.status == 503 and "ended before this text was complete" in running.answer["message"]
    with server(folder, tmp_path / "log") as one:
        one.start(LONG)
        one.process.send_signal(signal.SIGTERM)
        time.sleep(3)
        assert one.process.poll() is None
        one.process.send_signal(signal.SIGINT)
        assert one.wait(5) == 128 + signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize(("how", "flags", "answers", "text"), [
    # A step that fails ends its texts; the third in a row ends the server.
    ("raise RuntimeError('no such device')", (), [500, 500, 503], "engine has failed: RuntimeError: no such device"),
    ("time.sleep(1000)", ("--stall-timeout=2",), [503], "has not ended a step in 2 seconds (--stall-timeout)"),
])  # fmt: skip
def test_an_engine_that_is_lost(
    how: str, flags: tuple[str, ...], answers: list[int], text: str, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with server(folder, tmp_path / "log", *flags, before=BROKEN.format(how)) as one:
        for expected in answers:
            status, _, body = one.put(SHORT)
            assert status == expected, body
        assert text in body["message"]
        status, _, body = call(one.url, "GET", "/health")
        assert status == 503 and text.encode() in body and one.put()[0] == 503
        assert one.wait(20) == 1
    last = one.said().splitlines()[-1]
    assert last.startswith("megalith: the server has lost its model and ends: ") and text in last
    assert "Start the server again" in last


@pytest.mark.slow
def test_a_port_that_is_taken(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = f"--port={other.getsockname()[1]}"
        with pytest.raises(AssertionError, match="nothing else listens on"):
            server(folder, tmp_path / "log", port).__enter__()
    assert "Traceback" not in (tmp_path / "log").read_text()
