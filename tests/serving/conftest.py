"""Live servers on loopback around a tiny model with random weights."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from megalith.generation.model import TextModel
from megalith.generation.parallel.replicas import engine_of
from megalith.serving.app import create_app
from megalith.serving.connections import Connection
from megalith.serving.metrics import Metrics
from megalith.serving.options import ServeOptions
from megalith.serving.service import Service
from tests.generation.conftest import make, tokenizer, tokenizer_file  # noqa: F401 fixtures


@contextlib.contextmanager
def serving(model: TextModel, **options: Any) -> Iterator[tuple[str, Service]]:
    """A server of a model in a thread of this process: its URL and its service."""
    given = ServeOptions(port=0, **options)
    names = ("max_batch_size", "max_length", "max_cache_bytes")
    engine = engine_of(model, **{name: getattr(given, name) for name in names})
    service = Service(engine, given.model_name or "tiny", given, Metrics())
    server = uvicorn.Server(
        uvicorn.Config(create_app(service), port=0, log_level="warning", access_log=False, http=Connection)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(10)
        service.thread.stop(10)


@pytest.fixture
def served(make: Callable[..., TextModel]) -> Iterator[tuple[str, Service]]:  # noqa: F811
    with serving(make()) as running:
        yield running
