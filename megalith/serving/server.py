"""A server from its start to its exit status: sockets, signals, the drain, the loss of the model."""

from __future__ import annotations

import socket

import uvicorn

from megalith.generation.parallel.replicas import AnyEngine
from megalith.serving.app import create_app
from megalith.serving.metrics import Metrics
from megalith.serving.options import ServeOptions
from megalith.serving.service import Service


def serve(engine: AnyEngine, name: str, options: ServeOptions) -> int:
    """Serve until a signal or the loss of the model; the exit status."""
    service = Service(engine, name, options, Metrics())
    app = create_app(service)
    listener = socket.create_server((options.host, options.port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="info"))
    print(f"http://{options.host}:{listener.getsockname()[1]}", flush=True)
    server.run([listener])
    return 0 if service.failure is None else 1
