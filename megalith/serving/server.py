"""A server from its start to its exit status: its socket, signals, the drain, and the loss of the model.

The event loop has the main thread, the engine another one. Of several processes the first has both, and drives the
engines of the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator
from typing import Any, NoReturn

import torch.distributed as dist
import uvicorn

from megalith.common.environment import started_by_torchrun
from megalith.common.errors import ConfigError, RankError, problem
from megalith.common.orphans import GRACE
from megalith.generation.engine import Engine
from megalith.generation.generate import AnyEngine
from megalith.generation.model import TextModel, most_positions
from megalith.generation.parallel.driver import Driver, follow
from megalith.generation.parallel.ranks import Ranks, first_line
from megalith.generation.parallel.replicas import ReplicatedEngine, engine_of
from megalith.serving.access_log import LOGGING
from megalith.serving.app import create_app
from megalith.serving.connections import Connection
from megalith.serving.engine_thread import without_thread_pool
from megalith.serving.metrics import Metrics
from megalith.serving.options import ServeOptions
from megalith.serving.service import Service

CLOSING = 5.0  # seconds in which the last answers are written to clients that read them
RED = 3.0  # seconds that a server without its model still answers: its clients get 503, and probes see /health red
NAMING = 8.0  # as many at most, until it is known which of several processes was lost
REPEATED = 2.0  # seconds in which signals are one: Ctrl-C reaches every process of a terminal, and torchrun sends it on
SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN = "Start the server again; what its clients had asked for and not got, they must ask for again"


def serve_model(model: TextModel, name: str, options: ServeOptions) -> int:
    """Serve a model until a signal, or until it is lost, and return the exit status. Every process of it calls this.

    name: of the model, for clients. Prints the server's URL when it answers. Raises ConfigError where it cannot listen,
    or the model cannot be served so, RankError where another process was lost.
    """
    context = most_positions(model.config)
    if options.max_length is not None and context is not None and options.max_length > context:
        rule = f"must be at most {context}, the model's context (max_position_embeddings)"
        raise ConfigError(problem("--max-length", options.max_length, rule, "Give fewer, or leave it out"))
    several = model.runtime is not None and dist.get_world_size() > 1
    listener = bind(options.host, options.port) if not several or dist.get_rank() == 0 else None
    limits = {each: getattr(options, each) for each in ("max_batch_size", "max_length", "max_cache_bytes", "compile")}

    def warm_engine() -> Engine | ReplicatedEngine:
        with model.evaluating():
            engine = engine_of(model, **limits)
            engine.warm_up()
        return engine

    engine = without_thread_pool(warm_engine, next(model.model.parameters()).device)
    ranks = Ranks(model.runtime.mesh.device) if model.runtime is not None and several else None
    if ranks is None or listener is None:
        return serve(engine, name, options, listener) if ranks is None else _follow(engine, ranks)
    with ranks, Driver(engine) as driver:
        return serve(driver, name, options, listener, ranks)


def serve(
    engine: AnyEngine, name: str, options: ServeOptions, listener: socket.socket | None = None,
    ranks: Ranks | None = None,
) -> int:  # fmt: skip
    """Serve an engine; see serve_model. ranks: the other processes, which follow the engine."""
    service = Service(engine, name, options, Metrics())
    server = _Server(service, listener or bind(options.host, options.port))
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        status = runner.run(_run(server, service, ranks))
        if service.thread.thread.is_alive() or (status and ranks is not None):
            _exit(status)  # a thread in a collective, or in a step without end, would hold the process
    return status


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet. Raises ConfigError where it is taken, or none of ours."""
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except OSError as error:
        if bound is not None:
            bound.close()
        raise _not_bound(host, port, error) from None


def _not_bound(host: str, port: int, error: OSError) -> ConfigError:
    rule = f"must be an address of this machine that nothing else listens on ({error.strerror})"
    return ConfigError(
        problem("--host and --port", f"{host}:{port}", rule, "Try another --port (0: a free one), or correct --host")
    )


def _follow(engine: Engine | ReplicatedEngine, ranks: Ranks) -> int:
    """Do what the first process does until it ends; the exit status."""
    for each in SIGNALS:  # the first process gets them too, and ends all when its texts are complete
        signal.signal(each, signal.SIG_IGN)
    try:
        with ranks, engine.text_model.evaluating():
            follow(engine)
    except Exception as error:
        text = f"rank {ranks.rank} of {ranks.size} of the server has ended: {type(error).__name__}: {first_line(error)}"
        raise RankError(f"{text}. The first process says more.") from error
    return 0


class _Server(uvicorn.Server):
    """uvicorn's, on a bound socket, without its handlers of signals; it says where it listens."""

    def __init__(self, service: Service, listener: socket.socket):
        self.host, self.listener = service.options.host, listener
        super().__init__(
            uvicorn.Config(
                create_app(service), http=Connection, ws="none", log_config=LOGGING, access_log=False,
                server_header=False, timeout_graceful_shutdown=int(CLOSING),
                timeout_keep_alive=75,  # longer than proxies keep theirs, so that none sends into one that closes
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """Leave signals to `_run`."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        port = self.listener.getsockname()[1]
        try:
            await super().startup(sockets)
        except OSError as error:  # another process was faster, since `bind`
            raise _not_bound(self.host, port, error) from None
        print(f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{port}", flush=True)


async def _run(server: _Server, service: Service, ranks: Ranks | None) -> int:
    """Answer until a signal or the loss of the model, end as each demands, and return the exit status."""
    loop, signals = asyncio.get_running_loop(), asyncio.Queue[signal.Signals]()
    for each in SIGNALS:
        loop.add_signal_handler(each, signals.put_nowait, each)
    if ranks is not None:
        ranks.watch(service.fail)
    serving, status = loop.create_task(server.serve([server.listener])), 0
    try:
        end = await _first(lost=service.lost.wait(), signal=signals.get(), served=asyncio.wait([serving]))
        if end == "signal":
            drained = _drain(service, ranks, time.monotonic())
            end = await _first(lost=service.lost.wait(), again=_again(signals), drained=drained)
        if end == "again":
            _exit(128 + signals.get_nowait())
        if end == "lost":
            status = 1
            await _show_loss(service, ranks)
        service.give_up()
        server.should_exit = True
        await serving
    finally:
        await service.stop()
    return status


async def _first(**waits: Coroutine[Any, Any, Any]) -> str:
    """The name of the one that ends first, of several the first named; the others are cancelled."""
    tasks = {asyncio.ensure_future(each): name for name, each in waits.items()}
    done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    return next(name for task, name in tasks.items() if task in done)


async def _again(signals: asyncio.Queue[signal.Signals]) -> None:
    """Wait for a second signal; it stays in the queue."""
    await asyncio.sleep(REPEATED)
    while not signals.empty():
        signals.get_nowait()
    signals.put_nowait(await signals.get())


async def _drain(service: Service, ranks: Ranks | None, since: float) -> None:
    """Take nothing more and wait for what runs. since: when the signal came."""
    service.draining = True
    seconds = service.options.drain_timeout
    if started_by_torchrun():  # which would kill this process before
        seconds = min(seconds, GRACE - 2 * CLOSING)
    if texts := service.unfinished:
        print(
            f"megalith: the server ends when its texts are complete, now {texts}, in {seconds:g} s at the latest "
            f"(--drain-timeout); a second signal ends it at once", file=sys.stderr, flush=True,
        )  # fmt: skip
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while service.active:
                await asyncio.sleep(0.05)
    # The signal may be torchrun's, because another process has died: then the model is lost, and this is no drain.
    while ranks is not None and not ranks.all_seen_since(since):
        await asyncio.sleep(0.05)


async def _show_loss(service: Service, ranks: Ranks | None) -> None:
    """Answer 503 for a while, and say what was lost."""
    start = time.monotonic()
    while (passed := time.monotonic() - start) < RED or (ranks is not None and passed < NAMING and not ranks.silent()):
        await asyncio.sleep(0.1)
    lost = (ranks and ranks.lost(named=True)) or service.failure
    print(f"megalith: the server has lost its model and ends: {lost}. {AGAIN}.", file=sys.stderr, flush=True)


def _exit(status: int) -> NoReturn:
    """End this process now, whatever its threads do."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
