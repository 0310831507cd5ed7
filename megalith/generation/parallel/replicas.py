"""Replicas of a model behind one queue: each decodes a share of the requests.

Every process makes the same calls, so that all know all requests and which replica has each; a step exchanges what they
have generated. Results do not depend on which replica a request gets.
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
from typing import Any, TypeAlias

from torch import nn

from megalith.generation.engine import Engine
from megalith.generation.model import TextModel
from megalith.generation.parallel.runner import Seeds, as_error, as_text
from megalith.generation.request import BeamRequest, Event, Request
from megalith.runtime.build import Runtime

MESSAGE_BYTES, EVENT_BYTES = 256, 96  # of a usual message, besides its events, and of each of these


class ReplicatedEngine:
    """As Engine, with an Engine on each replica: on the data-parallel and context-parallel copies of the model."""

    def __init__(self, model: TextModel | Runtime, *, max_batch_size: int = 32, **options: Any):
        """max_batch_size: requests that run at one time, on all replicas together. options: see Engine."""
        self.text_model = TextModel.of(model)
        assert self.text_model.runtime is not None
        self.mesh = mesh = self.text_model.runtime.mesh
        self.number, contexts = mesh.data_size * mesh.size("cp"), mesh.size("cp")
        self.here = mesh.data_rank * contexts + mesh.rank("cp")
        self.engine = Engine(self.text_model, max_batch_size=-(-max_batch_size // self.number), **options)
        self.max_length = self.engine.max_length
        self.max_batch_size = min(max_batch_size, self.engine.max_batch_size * self.number)
        self.waiting: collections.deque[tuple[int, Request | BeamRequest]] = collections.deque()
        self.running: dict[int, int] = {}  # request -> its replica
        self.pending_events: list[Event] = []  # events that no step has returned yet, because an error ended it
        self.seeds, self.next_id = Seeds(mesh, mesh.device_mesh.mesh_dim_names or ()), 0

    def warm_up(self) -> None:
        """As Engine.warm_up."""
        self.engine.warm_up()

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running or self.pending_events)

    def check(self, request: Request | BeamRequest) -> None:
        """As Engine.check. A replica does a beam search as a whole."""
        self.engine.check(request)

    def check_length(self, prompt: int, new: int) -> None:
        """As Engine.check_length."""
        self.engine.check_length(prompt, new)

    def add(self, request: Request | BeamRequest) -> int:
        """As Engine.add."""
        self.check(request)
        if isinstance(request, Request) and request.params.seed is None:
            request = dataclasses.replace(request, params=dataclasses.replace(request.params, seed=self.seeds.draw()))
        self.waiting.append((self.next_id, request))
        self.next_id += 1
        return self.next_id - 1

    def cancel(self, id: int) -> bool:
        """As Engine.cancel."""
        self.pending_events = [event for event in self.pending_events if event.id != id]
        for waiting in self.waiting:
            if waiting[0] == id:
                self.waiting.remove(waiting)
                return True
        replica = self.running.pop(id, None)
        if replica == self.here:
            self.engine.cancel(id)
        return replica is not None

    def step(self) -> list[Event]:
        """As Engine.step, with the events of all replicas in the order of these. An error of one is raised on all."""
        self._assign()
        failure, events, lost = None, list[Event](), list[int]()
        try:
            events = self.engine.step()
        except Exception as error:  # the others wait, also where it is a bug
            failure, held = error, _held(self.engine)
            lost = [id for id, replica in self.running.items() if replica == self.here and id not in held]
        message = pickle.dumps((failure and as_text(failure), lost, events))
        expected = MESSAGE_BYTES + EVENT_BYTES * self.engine.max_batch_size
        results = [pickle.loads(each) for each in self.mesh.exchange_over_data(message, expected)]
        for _, lost, events in results:
            self.pending_events += events
            for id in (*lost, *(event.id for event in events if event.finish)):
                del self.running[id]
        for replica, (text, *_) in enumerate(results):
            if text is not None:
                raise failure if failure is not None and replica == self.here else as_error(text)
        events, self.pending_events = self.pending_events, []
        return events

    def _assign(self) -> None:
        """Give waiting requests to the replicas with most free rows, as long as there are any."""
        free = [self.engine.max_batch_size] * self.number
        for replica in self.running.values():
            free[replica] -= 1
        while self.waiting and any(free) and len(self.running) < self.max_batch_size:
            id, request = self.waiting.popleft()
            self.running[id] = replica = free.index(max(free))
            free[replica] -= 1
            if replica == self.here:
                self.engine.next_id = id  # so that its events have the ids of this engine
                self.engine.add(request)


def _held(engine: Engine) -> set[int]:
    """The requests of which an engine still returns events."""
    active = (*engine.waiting, *engine.prefill.reading, *engine.running)
    others = (*(id for id, _ in engine.searches), *(event.id for event in engine.pending_events))
    return {each.id for each in active}.union(others)


AnyEngine: TypeAlias = Engine | ReplicatedEngine


def engine_of(model: TextModel | Runtime | nn.Module, **options: Any) -> AnyEngine:
    """The engine of a model in its layout. options: see Engine; max_batch_size is that of all replicas together."""
    text_model = TextModel.of(model)
    mesh = None if text_model.runtime is None else text_model.runtime.mesh
    several = mesh is not None and mesh.data_size * mesh.size("cp") > 1
    return (ReplicatedEngine if several else Engine)(text_model, **options)
