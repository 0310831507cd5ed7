"""What routes stand on: texts of a service equal those of `complete`; a model that is lost ends them all, at once."""

import asyncio
import concurrent.futures
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from megalith.common.errors import MegalithError
from megalith.generation import generate as generate_module
from megalith.generation.generate import complete
from megalith.generation.model import TooLong
from megalith.generation.parallel.replicas import engine_of
from megalith.generation.params import GenerationParams
from megalith.serving import service as service_module
from megalith.serving.errors import Unavailable
from megalith.serving.metrics import Metrics
from megalith.serving.options import ServeOptions
from megalith.serving.service import Service
from tests.serving.plain_http import held

PARAMS = [
    GenerationParams(temperature=0.0, max_new_tokens=5, logprobs=True), GenerationParams(seed=4, num_samples=2),
    GenerationParams(beam_width=3, num_samples=2, max_new_tokens=4, logprobs=True), GenerationParams(max_new_tokens=0),
    GenerationParams(max_new_tokens=0, prompt_logprobs=True), GenerationParams(seed=1, max_new_tokens=30),
]  # fmt: skip
PROMPTS = ["Once upon", "a", "Zürich", "time", "Once upon a time", ""]


def with_service(model, work: Callable[[Service], Awaitable[Any]], **options: Any) -> Any:
    """What `work` returns; afterwards nothing may be left."""

    async def run() -> Any:
        given = ServeOptions(**options)
        service = Service(engine_of(model, max_batch_size=given.max_batch_size), "tiny", given, Metrics())
        service.start()
        try:
            found = await work(service)
            assert not service.active and service.unfinished == 0
            return found
        finally:
            assert await service.stop()

    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # the main one may have a loop of Playwright's
        return thread.submit(asyncio.run, run()).result()


def test_texts_are_those_of_complete(make) -> None:
    model = make()

    async def submit(service: Service) -> list:
        with await service.submit(PROMPTS, PARAMS) as submission:
            assert submission.unfinished == 6  # of eight texts two are the results of one search, and one needs nothing
            return await submission.completions()

    assert with_service(model, submit) == complete(model, PROMPTS, params=PARAMS)


def test_a_process_that_was_stopped_has_not_lost_its_model(make) -> None:
    """After a long Ctrl-Z the engine's last sign is old when the event loop looks first."""

    async def stopped(service: Service) -> str | None:
        for _ in range(30):  # whenever it looks
            service.thread.last_sign -= 1000.0
            await asyncio.sleep(0.05)
        return service.failure

    assert with_service(make(), stopped, stall_timeout=300.0) is None


def test_too_long_for_the_engine_is_known_before_each_text_copies_the_prompt(make, monkeypatch) -> None:
    model = make(position_embedding_type="alibi", max_position_embeddings=None)
    engine = engine_of(model, max_batch_size=2, max_length=100)
    monkeypatch.setattr(generate_module, "PendingCompletion", None)
    with pytest.raises(TooLong, match="at most 100, the max_length of this engine"):
        generate_module.Call(engine, [5] * 101, GenerationParams(num_samples=100), {})


def test_nothing_is_asked_for(make) -> None:
    async def submit(service: Service) -> list:
        with held(service), await service.submit("a", GenerationParams(max_new_tokens=0)) as submission:
            return await submission.completions()

    assert with_service(model := make(), submit) == complete(model, "a", max_new_tokens=0)


def test_what_the_engine_would_refuse_is_refused_at_once(make) -> None:
    async def submit(service: Service) -> None:
        for name, value in (("beam_width", 9), ("max_new_tokens", 200), ("logit_bias", {999: 1.0})):
            with pytest.raises(MegalithError, match={"max_new_tokens": "too long"}.get(name, name.replace("_", "-"))):
                await service.submit("a", GenerationParams(**{name: value}))

    with_service(make(), submit, max_batch_size=8)


def test_a_model_that_is_lost(make) -> None:
    """Texts that run, those of a submission that is not entered yet, and those that come."""

    async def lose(service: Service) -> None:
        with held(service), await service.submit("a", GenerationParams()) as running:
            late = await service.submit("a", GenerationParams())
            service.fail("the test has taken it")
            with pytest.raises(Unavailable, match="the test has taken it"):
                await asyncio.wait_for(running.completions(), 5)
            with late, pytest.raises(Unavailable, match="the test has taken it"):
                await asyncio.wait_for(late.completions(), 5)
            with pytest.raises(Unavailable, match="the test has taken it"):
                await service.submit("a", GenerationParams())
            assert service.lost.is_set() and service.unfinished == 0

    with_service(make(), lose)


def test_a_thread_that_fails(make) -> None:
    async def fail(service: Service) -> str:
        def step() -> None:
            raise SystemExit("of the test")

        service.engine.step = step
        with await service.submit("a", GenerationParams()) as submission:
            with pytest.raises(Unavailable, match="SystemExit: of the test"):
                await asyncio.wait_for(submission.completions(), 10)
        return service.trouble

    assert "the engine has failed" in with_service(make(), fail)


def test_a_step_that_does_not_end(make) -> None:
    async def hang(service: Service) -> float:
        start = time.monotonic()
        with held(service), await service.submit("a", GenerationParams()) as submission:
            with pytest.raises(Unavailable, match=r"has not ended a step in 1 seconds \(--stall-timeout\)"):
                await asyncio.wait_for(submission.completions(), 10)
        return time.monotonic() - start

    assert 1.0 < with_service(make(), hang, stall_timeout=1.0) < 9.0


def test_the_end_of_a_service(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete texts stay; those that run end."""
    monkeypatch.setattr(service_module, "LONGEST_STEP", 5.0)

    async def end(service: Service) -> list:
        with await service.submit("a", GenerationParams(seed=1, max_new_tokens=3)) as complete_one:
            while complete_one.unfinished:
                await asyncio.sleep(0.01)
            with held(service), await service.submit("a", GenerationParams()) as running:
                service.give_up()
                with pytest.raises(Unavailable, match="has ended"):
                    await running.completions()
                with pytest.raises(Unavailable, match="is ending"):
                    await service.submit("a", GenerationParams())
            return await complete_one.completions()

    assert with_service(model := make(), end) == complete(model, "a", seed=1, max_new_tokens=3)
