"""One process that drives an engine of several, as a server does; the others repeat what it asks of the engine.

    engine = engine_of(model)                    # on all processes
    if is_main_process:
        with Driver(engine) as driver:
            driver.add(...)
            events = driver.step()
    else:
        follow(engine)                           # until the block above is left

At each step the others receive the number of bytes of calls (`add`, `cancel`), and these where there are any.
They wait for it as long as it takes. The end of the block ends them, after an error too. If the driver's process dies,
its connections close, and their wait or step fails at once.
"""

from __future__ import annotations

import dataclasses
import datetime
import pickle
import secrets
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megalith.common.errors import MegalithError, RankError
from megalith.generation.parallel.replicas import AnyEngine
from megalith.generation.request import BeamRequest, Event, Request

FOREVER = datetime.timedelta(days=365)  # an idle driver calls no step
CLOSED = -1  # in place of a number of bytes


class Driver:
    """As the engine that it drives. Process 0 makes one while all others call `follow`."""

    def __init__(self, engine: AnyEngine):
        """engine: one that nobody has used yet, on every process."""
        self.engine, self.text_model = engine, engine.text_model
        self.max_length, self.max_batch_size = engine.max_length, engine.max_batch_size
        self.group, self.calls, self.following = _control_group(), list[tuple[str, Any]](), True

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self.engine.busy

    def check(self, request: Request | BeamRequest) -> None:
        """As Engine.check."""
        self.engine.check(request)

    def check_length(self, prompt: int, new: int) -> None:
        """As Engine.check_length."""
        self.engine.check_length(prompt, new)

    def add(self, request: Request | BeamRequest) -> int:
        """As Engine.add."""
        # The engine would draw it together with the others.
        if isinstance(request, Request) and request.params.seed is None:
            seeded = dataclasses.replace(request.params, seed=secrets.randbits(63))
            request = dataclasses.replace(request, params=seeded)
        id = self.engine.add(request)
        self.calls.append(("add", request))
        return id

    def cancel(self, id: int) -> bool:
        """As Engine.cancel."""
        self.calls.append(("cancel", id))
        return self.engine.cancel(id)

    def step(self) -> list[Event]:
        """As Engine.step. The others are lost after an error that not all processes have: one that is no MegalithError,
        or that says so.
        """
        message, self.calls = pickle.dumps(self.calls) if self.calls else b"", []
        self.following = False
        _broadcast(torch.tensor(len(message)), self.group)
        if message:
            _broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8), self.group)
        try:
            events = self.engine.step()
        except MegalithError as error:
            self.following = not isinstance(error, RankError)
            raise
        self.following = True
        return events

    def close(self) -> None:
        """End the others' `follow`. Without effect where they are lost: they fail when this process ends."""
        if self.following:
            self.following = False
            _broadcast(torch.tensor(CLOSED), self.group)

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:  # fmt: skip
        self.close()


def follow(engine: AnyEngine) -> None:
    """Do with the engine what the driver does, until that is closed or lost."""
    group = _control_group()
    while (length := int(_broadcast(torch.tensor(0), group))) != CLOSED:
        message = _broadcast(torch.empty(length, dtype=torch.uint8), group) if length else None
        for name, argument in pickle.loads(message.numpy().tobytes()) if message is not None else ():
            getattr(engine, name)(argument)
        try:
            engine.step()
        except MegalithError as error:
            if isinstance(error, RankError):
                raise  # other errors the driver has too


def _control_group() -> dist.ProcessGroup | None:
    """A group of all processes whose waits do not time out, on the CPU; None for one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=FOREVER)


def _broadcast(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None:
        dist.broadcast(values, 0, group=group)
    return values
