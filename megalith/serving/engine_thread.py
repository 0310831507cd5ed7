"""The thread that runs the engine, and how texts come and go between it and the event loop.

Everything that changes the engine happens in this thread, between two of its steps. What a step has brought is handed to
the event loop in one call, so that many short texts cost as little as one long one.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from megalith.common.errors import MegalithError
from megalith.generation.generate import AnyEngine, PendingCompletion
from megalith.generation.request import BeamRequest, Event, Hypothesis, TopLogprobs

IDLE = 1.0  # seconds between two signs of life of a thread that has nothing to do


@dataclasses.dataclass(frozen=True)
class Update:
    """A new token of completion `number` of a submission, and the text that is certain by now.

    done: whether it was the last of its completion. beams: all results of a beam search, which come at once; token is
    None then, and where no new tokens were asked for.
    """

    number: int
    token: int | None
    text: str
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()
    done: bool = False
    beams: Sequence[Hypothesis] = ()


@dataclasses.dataclass(eq=False)
class Job:
    """One text, or one beam search, of a submission.

    deliver: called in the engine's thread with what each step brought. id: of the engine, once it knows the job.
    """

    number: int
    request: PendingCompletion | BeamRequest
    deliver: Callable[[Update | MegalithError], None]
    id: int | None = None
    cancelled: bool = False

    @property
    def beams(self) -> bool:
        """Whether this is a beam search."""
        return isinstance(self.request, BeamRequest)


class EngineThread:
    """Runs an engine until `stop`, or until it fails."""

    def __init__(
        self, engine: AnyEngine, *, after_step: Callable[[], None] = lambda: None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ):  # fmt: skip
        """after_step: called in the thread after each step, and after its deliveries. on_failure: called once, in the
        thread, with what ended it; jobs get that error too.
        """
        self.engine, self.after_step, self.on_failure = engine, after_step, on_failure
        self.condition = threading.Condition()
        self.arrivals, self.departures = collections.deque[Job](), collections.deque[Job]()
        self.jobs = dict[int, Job]()  # by the engine's id; of this thread alone
        self.stopping, self.failure = False, None
        self.last_sign = time.monotonic()  # when the thread last was between two steps
        self.thread = threading.Thread(target=self._run, name="megalith-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def add(self, job: Job) -> None:
        """Give a job to the engine, from any thread."""
        with self.condition:
            self.arrivals.append(job)
            self.condition.notify()

    def cancel(self, job: Job) -> None:
        """End a job, from any thread; it may be unknown to the engine yet, or ended."""
        job.cancelled = True
        with self.condition:
            self.departures.append(job)
            self.condition.notify()

    def stop(self, timeout: float) -> bool:
        """End the thread after its current step; whether it ended in so many seconds."""
        with self.condition:
            self.stopping = True
            self.condition.notify()
        self.thread.join(timeout)
        return not self.thread.is_alive()

    def seconds_since_sign(self) -> float:
        """How long the current step, or the wait for work, has lasted."""
        return time.monotonic() - self.last_sign

    def _run(self) -> None:
        try:
            with self.engine.text_model.evaluating():
                while self._take_commands():
                    self.last_sign = time.monotonic()
                    self._step()
                    self.after_step()
                    self.last_sign = time.monotonic()
        except BaseException as error:  # the server must know, whatever it is
            self.failure = error
            self.on_failure(error)

    def _take_commands(self) -> bool:
        """Wait for work, take it, and return whether the thread goes on."""
        with self.condition:
            if not (self.arrivals or self.departures or self.stopping or self.engine.busy):
                self.condition.wait(IDLE)
            arrivals, self.arrivals = self.arrivals, collections.deque()
            departures, self.departures = self.departures, collections.deque()
        for job in arrivals:
            if not job.cancelled:
                self._add(job)
        for job in departures:
            self._remove(job)
        return not self.stopping

    def _add(self, job: Job) -> None:
        try:
            job.id = self.engine.add_beams(job.request) if job.beams else self.engine.add(job.request.request)
        except MegalithError as error:
            job.deliver(error)
            return
        self.jobs[job.id] = job

    def _remove(self, job: Job) -> None:
        if job.id is not None and self.jobs.pop(job.id, None) is not None:
            self.engine.cancel(job.id)

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except MegalithError as error:  # of the numbers of a text; the engine itself can go on
            for job in list(self.jobs.values()):
                self._remove(job)
                job.deliver(error)
            return
        for event in events:
            self._handle(event)

    def _handle(self, event: Event) -> None:
        job = self.jobs.get(event.id)
        if job is None:
            return
        if job.beams:
            del self.jobs[event.id]
            job.deliver(Update(job.number, None, "", done=True, beams=event.beams))
            return
        text = job.request.push(event)
        if job.request.done:
            del self.jobs[event.id]
            if event.finish is None:  # ended by its text, of which the engine does not know
                self.engine.cancel(event.id)
        job.deliver(Update(job.number, event.token, text, event.logprob, event.top_logprobs, job.request.done))
