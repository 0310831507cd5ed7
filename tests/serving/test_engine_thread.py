"""The engine's thread: errors that end one text, those that end all, those that end the thread; and cancellations."""

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megalith.common.errors import ConfigError
from megalith.generation.engine import Engine
from megalith.generation.generate import Call, complete
from megalith.serving.engine_thread import MOST_FAILURES, EngineThread, Job, without_thread_pool
from megalith.serving.errors import Failed

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "seed": 3, "stop_at_eod": False}


class Running:
    """An engine in its thread, and what it delivers for each job."""

    def __init__(self, model):
        self.engine, self.failures = Engine(model, max_batch_size=4), queue.SimpleQueue()
        self.thread, self.inboxes = EngineThread(self.engine, on_failure=self.failures.put), {}

    def start(self, *prompts: list[int], **options: Any) -> tuple[Call, list[Job]]:
        call = Call(self.engine, list(prompts), None, {**OPTIONS, **options})
        return call, [self.add(number, each) for number, each in call.requests()]

    def add(self, number: int, request: Any) -> Job:
        inbox = queue.SimpleQueue()
        job = Job(number, request, inbox.put)
        self.inboxes[job] = inbox
        self.thread.add(job)
        return job

    def end(self, job: Job) -> Any:
        """The last delivery of a job: an error, or the update that is `done`."""
        while True:
            got = self.inboxes[job].get(timeout=30)
            if isinstance(got, Exception) or got.done:
                return got

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Within the block the thread is in a step that does not end."""
        entered, go_on, step = threading.Event(), threading.Event(), self.engine.step

        def stand():
            entered.set()
            assert go_on.wait(30)
            return step()

        self.engine.step = stand
        _, (job,) = self.start([5])
        assert entered.wait(30)
        try:
            yield
        finally:
            self.engine.step = step
            go_on.set()
            assert self.end(job).done


@pytest.fixture
def running(make) -> Iterator[Running]:
    made = Running(make(untie_embeddings_and_output_weights=True))
    made.thread.start()
    yield made
    assert made.thread.stop(30)


def test_a_damaged_text_fails_alone(running) -> None:
    model = running.engine.text_model
    expected = complete(model, [[7, 8], [9]], **OPTIONS)
    with torch.no_grad():
        model.embedding.weight[33] = float("nan")
    call, (*good, bad) = running.start([7, 8], [9], [7, 33])
    error = running.end(bad)
    assert isinstance(error, Failed) and "not numbers" in str(error) and error.status == 500
    assert all(running.end(job).done for job in good) and call.completions()[:2] == expected
    _, (beams,) = running.start([7, 33], max_new_tokens=3, seed=None, beam_width=2)
    assert isinstance(running.end(beams), Failed)


def test_a_text_that_cannot_be_decoded_fails_alone(running) -> None:
    call = Call(running.engine, [[7, 8], [9]], None, OPTIONS)
    (_, bad), (_, good) = call.requests()
    bad.push = lambda event: {}["no text"]
    error, update = (running.end(job) for job in (running.add(0, bad), running.add(1, good)))
    assert isinstance(error, Failed) and "KeyError" in str(error) and update.done
    assert call.completions()[1] == complete(running.engine.text_model, [[7, 8], [9]], **OPTIONS)[1]


def test_a_step_that_fails_ends_what_runs_and_a_device_that_is_lost_ends_the_thread(running) -> None:
    step, failures = running.engine.step, MOST_FAILURES - 1

    def failing():
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise MemoryError("none is left")
        return step()

    running.engine.step = failing
    for _ in range(MOST_FAILURES - 1):
        _, (job,) = running.start([7, 8])
        error = running.end(job)
        assert (
            isinstance(error, Failed) and "none is left" not in str(error) and "MemoryError in the engine" in str(error)
        )
    call, (job,) = running.start([7, 8])
    assert running.end(job).done and call.completions() == complete(running.engine.text_model, [[7, 8]], **OPTIONS)
    assert running.failures.empty() and running.engine.cache.bytes_in_use == 0
    failures = MOST_FAILURES
    for _ in range(MOST_FAILURES - 1):
        _, (job,) = running.start([7, 8])
        running.end(job)
    running.start([7, 8])
    assert isinstance(running.failures.get(timeout=30), MemoryError)


def test_jobs_that_are_cancelled(running) -> None:
    """Before the engine knows them, when they have ended, and while they run."""
    with running.standing():
        _, (early, kept) = running.start([7, 8], [9])
        running.thread.cancel(early)
    assert running.end(kept).done and early.id is None and running.inboxes[early].empty()
    running.thread.cancel(kept)
    _, (late,) = running.start([7, 8], max_new_tokens=190)
    assert running.inboxes[late].get(timeout=30).token is not None
    with running.standing():
        running.thread.cancel(late)
    while not running.inboxes[late].empty():
        assert not running.inboxes[late].get().done
    assert not running.engine.busy and not running.thread.jobs and running.engine.cache.bytes_in_use == 0


def test_what_the_engine_refuses_is_the_requests_error(running) -> None:
    _, (job,) = running.start([7], max_new_tokens=3, seed=None, beam_width=9)
    error = running.end(job)
    assert isinstance(error, ConfigError) and "--beam-width must be at most 4" in str(error)


def test_what_computes_before_the_engine_leaves_nothing():
    main, cpu = threading.get_ident(), torch.device("cpu")
    assert without_thread_pool(threading.get_ident, cpu) != main
    assert without_thread_pool(threading.get_ident, torch.device("cuda")) == main
    with pytest.raises(ConfigError, match="the same error"):
        without_thread_pool(lambda: (_ for _ in ()).throw(ConfigError("the same error")), cpu)


@pytest.mark.skipif(sys.platform != "linux", reason="finds threads in /proc")
def test_a_thread_that_ends_takes_its_pool_along():
    program = """
import os, time, torch
from megalith.serving.engine_thread import without_thread_pool
count = lambda: len(os.listdir("/proc/self/task"))
compute = lambda: torch.ones(1 << 20).add(1.0).sum().item()
before, end = count(), time.monotonic() + 10
without_thread_pool(compute, torch.device("cpu"))
while count() > before and time.monotonic() < end:
    time.sleep(0.01)
apart = count() - before
compute()
print(apart, count() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["0", "1"], done
