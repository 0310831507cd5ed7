"""The thread that runs the engine, and how texts come and go between it and the event loop.

Everything that changes the engine happens in this thread, between two of its steps. What a step has brought is handed
to the event loop in one call, so that many short texts cost as little as one long one.

An error of one text ends that text. One that the engine cannot ascribe to a text ends all that run, and the engine goes
on; if the next steps fail too, nobody could be served, and the thread ends.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from megalith.common.errors import MegalithError
from megalith.generation.generate import AnyEngine, PendingCompletion
from megalith.generation.parallel.driver import Driver
from megalith.generation.request import BeamRequest, Event, Hypothesis, TopLogprobs
from megalith.serving.errors import Failed

T = TypeVar("T")
LOG = logging.getLogger("megalith.serving")
IDLE = 1.0  # seconds between two signs of life of a thread that has nothing to do
MOST_FAILURES = 3  # steps in a row: a device that is lost fails at every one, a prompt too large for it at one


def without_thread_pool(function: Callable[[], T], device: torch.device) -> T:
    """What `function` returns, which computes before the engine's thread does; what it raises is raised.

    On a CPU it runs in a thread that ends with it. OpenMP (libgomp) keeps a pool of threads for each thread that has
    computed, and where all pools have more threads than there are cores, those wait asleep for one another at the end
    of every operation: with a pool of the main thread, from loading the model, steps of the engine's thread take a
    fifth longer. On accelerators, where the current device is that of a thread, it runs in this thread.
    """
    if device.type != "cpu":
        return function()
    results, errors = list[T](), list[BaseException]()

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="megalith-load", daemon=True)  # Ctrl-C does not wait for it
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


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

    deliver: called in the engine's thread with what each step brought; an error is the last. id: of the engine, while
    it has the job. cancelled: nobody waits for it any more.
    """

    number: int
    request: PendingCompletion | BeamRequest
    deliver: Callable[[Update | MegalithError], None]
    id: int | None = None
    cancelled: bool = False


class EngineThread:
    """Runs an engine until `stop`, or until it fails."""

    def __init__(
        self, engine: AnyEngine, *, after_step: Callable[[], None] = lambda: None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ):  # fmt: skip
        """after_step: called in the thread after each step, and after its deliveries. on_failure: called once, in the
        thread, with what ended it; its jobs get nothing more.
        """
        self.engine, self.after_step, self.on_failure = engine, after_step, on_failure
        self.condition = threading.Condition()
        self.arrivals, self.departures = list[Job](), list[Job]()
        self.jobs = dict[int, Job]()  # by the engine's id; of this thread alone
        self.stopping, self.failures = False, 0
        self.last_sign = time.monotonic()  # when the thread last was between two steps
        self.thread = threading.Thread(target=self._run, name="megalith-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.last_sign = time.monotonic()
        self.thread.start()

    def add(self, job: Job) -> None:
        """Give a job to the engine, from any thread."""
        with self.condition:
            self.arrivals.append(job)
            self.condition.notify()

    def cancel(self, job: Job) -> None:
        """End a job, from any thread, after its `add`; it may be unknown to the engine yet, or ended."""
        with self.condition:
            job.cancelled = True
            self.departures.append(job)
            self.condition.notify()

    def stop(self, timeout: float) -> bool:
        """End the thread after its current step; whether it ended in so many seconds."""
        with self.condition:
            self.stopping = True
            self.condition.notify()
        if self.thread.ident is not None:  # it was started
            self.thread.join(timeout)
        return not self.thread.is_alive()

    def seconds_since_sign(self) -> float:
        """How long the current step has lasted, or a part of the wait for work."""
        return time.monotonic() - self.last_sign

    def _run(self) -> None:
        try:
            with self.engine.text_model.evaluating():
                while not self.stopping:
                    self.last_sign = time.monotonic()
                    if self._take_commands():
                        self._step()
                    self.after_step()
        except BaseException as error:  # the server must know, whatever it is
            LOG.error("the engine's thread has ended", exc_info=error)
            self.on_failure(error)

    def _take_commands(self) -> bool:
        """Wait for work and take it. Returns whether a step would do anything."""
        with self.condition:
            if not (self.arrivals or self.departures or self.stopping or self.engine.busy):
                self.condition.wait(IDLE)
            arrivals, self.arrivals = self.arrivals, []
            departures, self.departures = self.departures, []
        for job in arrivals:
            if not job.cancelled:
                self._add(job)
        removed = [self._remove(job) for job in departures]
        return self.engine.busy or any(removed)  # with a Driver the others learn of these in a step

    def _add(self, job: Job) -> None:
        request = job.request
        try:
            job.id = self.engine.add(request if isinstance(request, BeamRequest) else request.request)
        except MegalithError as error:
            job.deliver(error)
            return
        self.jobs[job.id] = job

    def _remove(self, job: Job) -> bool:
        """Make the engine forget a job; whether it had it."""
        if job.id is None or self.jobs.pop(job.id, None) is None:
            return False
        return self.engine.cancel(job.id)

    def _fail(self, job: Job, error: BaseException) -> None:
        self._remove(job)
        foreign = f"{type(error).__name__} in the engine; the server's log says more"  # its text may hold paths
        text = str(error) if isinstance(error, MegalithError) else foreign
        job.deliver(Failed(f"this text could not be written: {text}"))

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception as error:
            self.failures += 1
            lost = isinstance(self.engine, Driver) and not self.engine.following  # the other processes
            if lost or self.failures == MOST_FAILURES:
                raise
            LOG.error("a step of the engine has failed, and the texts that ran with it", exc_info=error)
            for job in list(self.jobs.values()):
                self._fail(job, error)
            return
        self.failures = 0
        for event in events:
            if (job := self.jobs.get(event.id)) is not None:
                self._handle(job, event)

    def _handle(self, job: Job, event: Event) -> None:
        if event.error is not None:
            self._fail(job, event.error)
            return
        if isinstance(job.request, BeamRequest):
            del self.jobs[event.id]
            job.deliver(Update(job.number, None, "", done=True, beams=event.beams))
            return
        try:
            text = job.request.push(event)
        except Exception as error:  # of a tokenizer
            LOG.error("the text of a token has failed", exc_info=error)
            self._fail(job, error)
            return
        if job.request.done:  # maybe by its text, of which the engine does not know
            self._remove(job)
        job.deliver(Update(job.number, event.token, text, event.logprob, event.top_logprobs, job.request.done))
