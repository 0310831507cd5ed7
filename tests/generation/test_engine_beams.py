"""Beam search beside other requests: the results of `beam_search`, a step at a time, memory that is freed, errors."""

import gc
import random
import weakref

import pytest
import torch

from megalith.common.errors import CheckpointError, ConfigError, DataError
from megalith.generation import beam
from megalith.generation.beam import BeamSearch, beam_search, search
from megalith.generation.engine import Engine, Request
from megalith.generation.generate import Call, complete
from megalith.generation.model import TextModel
from megalith.generation.params import GenerationParams, SamplingParams
from megalith.generation.request import BeamRequest
from megalith.generation.runner import ModelRunner
from tests.generation.test_engine import FORMS, events_alone, requests, run, told


def beams(prompt: list[int], width: int, new: int = 6, **options) -> BeamRequest:
    return BeamRequest(prompt_ids=prompt, beam_width=width, num_samples=width - 1, max_new_tokens=new, **options)


SEARCHES = [
    beams(list(range(60, 100)), 4), beams([3], 3, 9, stop_token_ids=tuple(range(0, 300, 2))),
    beams([3] * 16, 2, 5, length_penalty=0.0),
]  # fmt: skip


@pytest.mark.parametrize("form", ["absolute", "t5"])
def test_searches_among_other_requests(form: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextModel, "decoder_start", 0)
    monkeypatch.setattr(beam, "READ_AT_ONCE", 16)
    model, steps, step = make(**FORMS[form]), list[BeamSearch](), BeamSearch.step
    monkeypatch.setattr(BeamSearch, "step", lambda self: steps.append(self) or step(self))
    expected = [search(model, each) for each in SEARCHES]
    alone, sampled = Engine(model, max_batch_size=4), requests(random.Random(4), 6)
    expected_events = [events_alone(alone, each) for each in sampled]
    engine, found = Engine(model, max_batch_size=4), dict[int, list]()
    ids = [engine.add(each) for each in (SEARCHES[0], *sampled, *SEARCHES[1:])]
    steps.clear()
    while engine.busy:
        before = len(steps)
        for event in engine.step():
            found.setdefault(event.id, []).append(event)
        assert len(steps) <= before + 1
    order = [each.request for each in dict.fromkeys(steps)]
    assert order == SEARCHES and engine.cache.bytes_in_use == 0
    assert [list(map(told, found[id])) for id in ids[1:7]] == expected_events
    for id, best in zip((ids[0], *ids[7:]), expected):
        (event,) = found[id]
        assert event.beams == best and len(best) > 0 and event.token is None and event.finish == best[0].finish
    assert {each.finish for best in expected for each in best} == {"stop", "length"}


def test_a_search_that_is_cancelled_frees_its_memory(make) -> None:
    engine = Engine(make(), max_batch_size=4)
    first, second = (engine.add(beams([3, 4], 4)) for _ in range(2))
    engine.step()
    cache = weakref.ref(engine.searches[0][1].runner.cache)
    assert cache() is not None and engine.searches[1][1].runner is None  # which waits
    assert engine.bytes_in_use == cache().bytes_allocated == engine.bytes_allocated - engine.cache.bytes_allocated > 0
    assert engine.cancel(first) and not engine.cancel(first)
    gc.collect()
    assert cache() is None and engine.busy and engine.bytes_in_use == 0
    assert [event.id for event in run(engine)] == [second] and not engine.busy
    assert engine.bytes_in_use == 0 and engine.bytes_allocated == engine.cache.bytes_allocated


def test_a_search_without_memory_ends_alone(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache is allocated when it starts, and may then be more than an accelerator has left."""
    model, sampled = make(), requests(random.Random(5), 3)
    expected = [events_alone(Engine(model, max_batch_size=4), each) for each in sampled]
    engine, runner_of = Engine(model, max_batch_size=4), beam.runner_of

    def allocate(model: TextModel, rows: int, *lengths: int, **options: bool) -> ModelRunner:
        if rows == 4:
            raise torch.OutOfMemoryError("none left")
        return runner_of(model, rows, *lengths, **options)

    monkeypatch.setattr(beam, "runner_of", allocate)
    wide, *ids, narrow = [engine.add(each) for each in (beams([3, 4], 4), *sampled, beams([3, 4], 2))]
    events = run(engine)
    (failed,) = (event for event in events if event.id == wide)
    assert failed.finish == "error" and "too little for 4 beams of 8 tokens" in str(failed.error)
    assert [[told(event) for event in events if event.id == id] for id in ids] == expected
    assert [event.beams for event in events if event.id == narrow] == [search(model, beams([3, 4], 2))]
    assert not engine.busy and engine.bytes_in_use == 0


def test_what_cannot_be_searched(make) -> None:
    engine = Engine(make(), max_batch_size=3, max_length=64)
    with pytest.raises(ConfigError, match=r"--beam-width must be at most 3, .* at one time; found 4\. Ask for fewer"):
        engine.add(beams([1], 4))
    with pytest.raises(ConfigError, match=r"must be at most 64, .*; found 65 \(60 and 5\)"):
        engine.add(beams([1] * 60, 3, 5))
    with pytest.raises(DataError, match="found 300"):
        engine.add(beams([300], 3))
    for wrong in (beams([1], 1), beams([1], 3, 0), beams([], 3)):
        with pytest.raises(ConfigError):
            engine.check(wrong)
    assert not engine.busy
    everything = beams([1], 3, stop_token_ids=tuple(range(300)))  # where nothing goes on
    engine.add(everything)
    (event,) = run(engine)
    assert event.beams == search(engine.text_model, everything)
    assert [each.finish for each in event.beams] == ["stop", "stop"]


def test_a_call_that_an_engine_does(make) -> None:
    model = make()
    params = [GenerationParams(beam_width=3, num_samples=2, max_new_tokens=5, logprobs=True, echo=False),
              GenerationParams(seed=1, max_new_tokens=5)]  # fmt: skip
    call, engine = Call(model, ["Once", "Z"], params, {}), Engine(model, max_batch_size=4)
    known = {engine.add(each if isinstance(each, BeamRequest) else each.request): (number, each)
             for number, each in call.requests()}  # fmt: skip
    for event in run(engine):
        number, each = known[event.id]
        call.take_beams(number, event.beams) if event.beams else each.push(event)
    assert call.completions() == complete(model, ["Once", "Z"], params=params)
    one = beam_search(model, call.prompts[0].prompt_ids, prompt="Once", beam_width=3, num_samples=2, max_new_tokens=5)
    assert [each.continuation for each in one] == [each.text for each in call.completions()[:2]]


def test_damaged_weights_end_a_request_alone(make) -> None:
    """Of a search, of a prompt, of a prompt that is scored, and of a text that has begun."""
    model, damaged = make(untie_embeddings_and_output_weights=True), 33
    params = SamplingParams(seed=1, max_new_tokens=6, top_logprobs=2)
    good = Request(prompt_ids=[7, 8], params=params)
    expected = events_alone(Engine(model, max_batch_size=8), good)
    with torch.no_grad():
        model.embedding.weight[damaged] = float("nan")
    bias = SamplingParams(max_new_tokens=6, logit_bias={damaged: 1e6})
    scored = SamplingParams(max_new_tokens=0, prompt_logprobs=True)
    bad = [beams([7, damaged], 3), Request(prompt_ids=[7, damaged], params=params),
           Request(prompt_ids=[damaged, 7, 9], params=scored), Request(prompt_ids=[7, 8], params=bias)]  # fmt: skip
    engine = Engine(model, max_batch_size=8)
    first = engine.add(good)
    events = engine.step()
    ids, last = [engine.add(each) for each in bad], engine.add(good)
    events += run(engine)
    for id in (first, last):
        assert [told(event) for event in events if event.id == id] == expected
    for id in ids:
        event = [event for event in events if event.id == id][-1]
        assert event.finish == "error" and event.token is None and isinstance(event.error, CheckpointError)
        assert "not numbers" in str(event.error)
    assert [event.token for event in events if event.id == ids[-1]] == [damaged, None]
    assert not engine.busy and engine.cache.bytes_in_use == 0
    with pytest.raises(CheckpointError, match="not numbers"):
        complete(model, [[7, damaged]], max_new_tokens=3)
