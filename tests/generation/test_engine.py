"""Requests that come and go on one model, each with what it gives alone; and a model that keeps nothing of them."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from megalith.common.errors import CheckpointError, ConfigError, DataError
from megalith.generation import prefix
from megalith.generation.cached_attention import PrefillChunk
from megalith.generation.engine import Engine, Event, Request
from megalith.generation.generate import complete, generate, score, stream
from megalith.generation.model import TextModel
from megalith.generation.params import SamplingParams

FORMS: dict[str, dict[str, Any]] = {
    "absolute": {},
    "rotary, groups": {"position_embedding_type": "rope", "num_query_groups": 2, "normalization": "RMSNorm"},
    "alibi": {"position_embedding_type": "alibi"},
    "window": {"position_embedding_type": "rope", "sliding_window": 7, "full_attention_layers": [1]},
    "t5": {"model_type": "t5", "decoder_num_layers": 2},
    "t5, relative": {"model_type": "t5", "position_embedding_type": "relative", "normalization": "RMSNorm",
                     "add_bias_linear": False, "relative_attention_num_buckets": 8,
                     "relative_attention_max_distance": 12},
}  # fmt: skip


def requests(rng: random.Random, count: int) -> list[Request]:
    """Requests of all lengths, sampling settings and ends."""
    ways = (
        {"temperature": 0.0},
        {"temperature": 1.2},
        {"top_k": 20},
        {"top_p": 0.9, "top_p_decay": 0.9, "top_p_bound": 0.2},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.8},
    )
    made = []
    for _ in range(count):
        params = SamplingParams(
            max_new_tokens=rng.randint(1, 12), seed=rng.randrange(3), logprobs=True, top_logprobs=rng.choice((0, 0, 3)),
            stop_token_ids=tuple(range(0, 300, 37)), **rng.choice(ways),
        )  # fmt: skip
        ids = [rng.randrange(300) for _ in range(rng.choice((1, 2, 3, 5, 17, 62, 63, 64, 70, 120)))]
        if made and rng.random() < 0.5:  # the beginning of another's prompt, or all of it
            other = rng.choice(made).prompt_ids
            ids = [*other[: rng.choice((len(other), rng.randint(1, len(other))))], *ids][
                : rng.choice((len(other), 120))
            ]
        made.append(Request(prompt_ids=ids, params=params, index=rng.randrange(4)))
    return made


def told(event: Event) -> tuple:
    """What an event says of its request."""
    return event.token, event.logprob, event.top_logprobs, event.finish


def run(engine: Engine) -> list[Event]:
    """All events until the engine is idle."""
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


def events_alone(engine: Engine, request: Request) -> list[tuple]:
    """The events of a request that runs alone."""
    engine.add(request)
    return list(map(told, run(engine)))


def attributes_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a model refers to: attributes, hooks, parameters, buffers, by name and identity."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            inside = {each: id(held) for each, held in value.items()} if isinstance(value, dict) else None
            found[f"{name}.{attribute}"] = (id(value), inside)
    return found


def count_tokens_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of prompt tokens of each of the engine's prefills."""
    counts, prefill = list[int](), engine.runner.prefill

    def counted(chunks: Sequence[PrefillChunk]) -> torch.Tensor | None:
        counts.append(sum(len(chunk.source or chunk.ids) for chunk in chunks))
        return prefill(chunks)

    monkeypatch.setattr(engine.runner, "prefill", counted)
    return counts


@pytest.mark.parametrize("form", FORMS)
def test_each_gives_what_it_gives_alone(form: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 requests over all forms that come, wait and are cancelled at random: equal tokens, and log-probabilities to
    the last bit.
    """
    model = make(**FORMS[form])
    monkeypatch.setattr(TextModel, "decoder_start", 0)
    monkeypatch.setattr(prefix, "CHUNK", 16)
    rng, engine, given = random.Random(form), Engine(model, max_batch_size=5, prefill_tokens=40), dict[int, Request]()
    read = count_tokens_read(engine, monkeypatch)
    before, arriving = attributes_of(model.model), requests(rng, 34)
    made: dict[int, list[tuple]] = {}
    cancelled: set[int] = set()
    most = 0
    while arriving or engine.busy:
        for _ in range(min(len(arriving), rng.choice((0, 0, 1, 3)))):
            request = arriving.pop()
            id = engine.add(request)
            given[id], made[id] = request, []
        for event in engine.step():
            made[event.id].append(told(event))
        most = max(most, engine.bytes_in_use)
        living = [each.id for each in (*engine.running, *engine.prefill.reading, *engine.waiting)]
        if living and rng.random() < 0.1:
            cancelled.add(chosen := rng.choice(living))
            assert engine.cancel(chosen) and not engine.cancel(chosen)
    assert 0 < most <= engine.bytes_allocated and engine.bytes_in_use == 0
    assert len(cancelled) > 1
    assert sum(read) < sum(len(request.prompt_ids) for request in given.values())  # some were shared
    for id, request in given.items():
        expected = events_alone(Engine(model, max_batch_size=5), request)
        assert made[id] == (expected[: len(made[id])] if id in cancelled else expected), id
    assert attributes_of(model.model) == before


def test_two_engines_on_one_model(make) -> None:
    model, rng = make(), random.Random(1)
    pairs = [(Engine(model, max_batch_size=2), request) for request in requests(rng, 2)]
    for engine, request in pairs:
        engine.add(request)
    made: list[list[Event]] = [[], []]
    while any(engine.busy for engine, _ in pairs):
        for (engine, _), events in zip(pairs, made):
            events += engine.step()
    for (engine, request), events in zip(pairs, made):
        assert [told(event) for event in events] == events_alone(engine, request)


def test_generation_and_scores_leave_nothing_behind(make) -> None:
    model = make(z_loss_coeff=0.1)
    before, tensors = attributes_of(model.model), {name: each.clone() for name, each in model.state_dict().items()}
    complete(model, ["Once", "upon a time"], max_new_tokens=5, seed=1)
    score(model, ["Once upon a time"])
    generate(model, "Once", beam_width=3, max_new_tokens=4)
    assert attributes_of(model.model) == before
    assert all(torch.equal(tensors[name], each) for name, each in model.state_dict().items())


def test_memory_bounds_who_works_at_one_time(make) -> None:
    model = make()
    row = 2 * 2 * 32 * 4 * 64  # layers, k and v, hidden, bytes, places
    with pytest.raises(
        ConfigError,
        match=rf"max_cache_bytes must be at least {row}, .* of one request of 64 tokens; found {row - 1}\.",
    ):
        Engine(model, max_length=64, max_cache_bytes=row - 1)
    engine = Engine(model, max_length=64, max_cache_bytes=2 * row + 5)
    assert engine.max_batch_size == 2 and engine.cache.bytes_allocated == 2 * row
    asked = [SamplingParams(max_new_tokens=2 + number, seed=1) for number in range(4)]
    ids = [engine.add(Request(prompt_ids=[3], params=params)) for params in asked]
    assert {event.id for event in engine.step()} == set(ids[:2])  # the others wait
    assert engine.cache.bytes_of(ids[0]) == row and engine.cache.bytes_in_use == 2 * row
    assert [(event.id, event.finish) for event in engine.step()] == [(0, "length"), (1, None), (2, None)]
    while engine.busy:
        engine.step()
    assert engine.cache.bytes_in_use == 0
    with pytest.raises(ConfigError, match=r"must be at most 64, .*; found 65 \(60 and 5\)\."):
        engine.add(Request(prompt_ids=[1] * 60, params=SamplingParams(max_new_tokens=5)))
    with pytest.raises(ConfigError, match=r"prompt has 201 tokens.* limit .* 200"):
        engine.add(Request(prompt_ids=[1] * 201, params=SamplingParams(max_new_tokens=5)))
    with pytest.raises(DataError, match="found 300"):
        engine.add(Request(prompt_ids=[1, 300]))
    with pytest.raises(ConfigError, match="at least one token"):
        engine.add(Request(prompt_ids=[]))
    assert not engine.busy and not engine.cancel(99)
    for wrong in ({"max_length": 0}, {"max_length": -100}, {"max_batch_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Engine(engine.text_model, **wrong)


@pytest.mark.parametrize("form", ["absolute", "t5"])
def test_results_of_one_prompt_share_its_reading(form: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together, later, and where only whole chunks of the beginning are shared."""
    monkeypatch.setattr(TextModel, "decoder_start", 0)
    monkeypatch.setattr(prefix, "CHUNK", 16)
    engine, prompt = Engine(make(**FORMS[form]), max_batch_size=8), list(range(40))
    read, params = count_tokens_read(engine, monkeypatch), SamplingParams(seed=1, max_new_tokens=3)
    for index in range(6):
        engine.add(Request(prompt_ids=prompt, params=params, index=index))
    assert len(engine.step()) == 6 and read == [40]
    run(engine)
    engine.add(Request(prompt_ids=prompt, params=params))
    assert len(engine.step()) == 1 and read == [40]
    engine.add(Request(prompt_ids=[*prompt[:35], 7, 8, 9], params=params))
    engine.add(Request(prompt_ids=prompt[:32], params=params))  # its last token's logits are not known: 16 are read
    assert len(engine.step()) == 3 and read == ([40, 6 + 16] if form == "absolute" else [40, 38 + 32])
    engine.cancel(7), run(engine)
    scores = Engine(make(), max_batch_size=2)
    if form == "absolute":
        read = count_tokens_read(scores, monkeypatch)
        for _ in range(2):  # all logits of the prompt are wanted, so all of it is read
            scores.add(Request(prompt_ids=prompt, params=SamplingParams(max_new_tokens=0, prompt_logprobs=True)))
        one, two = run(scores)
        assert one.prompt == two.prompt and sum(read) == 80 and one.token is None and one.finish == "length"


def test_a_long_prompt_is_read_in_pieces_beside_others(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "CHUNK", 16)
    engine = Engine(make(), max_batch_size=3, prefill_tokens=32)
    read = count_tokens_read(engine, monkeypatch)
    first = engine.add(Request(prompt_ids=[1, 2], params=SamplingParams(max_new_tokens=20, seed=1)))
    engine.step()
    long = engine.add(Request(prompt_ids=list(range(100)), params=SamplingParams(max_new_tokens=2, seed=1)))
    short = engine.add(Request(prompt_ids=[9] * 10, params=SamplingParams(max_new_tokens=2, seed=1)))
    steps = [{event.id for event in engine.step()} for _ in range(5)]
    assert steps == [{first}, {first}, {first}, {first, long, short}, {first, long, short}]
    assert read == [2, 32, 32, 32, 4 + 10]


@pytest.mark.parametrize("fused", [False, True])
def test_another_step_of_training_makes_an_engine_read_prompts_again(fused: bool, make) -> None:
    model, request = make(), Request(prompt_ids=[3] * 40, params=SamplingParams(seed=1, logprobs=True))
    engine = Engine(model, max_batch_size=2)
    before = events_alone(engine, request)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    model(torch.tensor([[1, 2, 3]])).logsumexp(-1).sum().backward()
    optimizer.step()
    after = events_alone(engine, request)
    assert after != before and after == events_alone(Engine(model, max_batch_size=2), request)


def test_an_engine_goes_on_after_damaged_weights(make) -> None:
    """NaN that a request left in the cache is nobody else's."""
    model, request = make(), Request(prompt_ids=[1, 2], params=SamplingParams(seed=1))
    engine, weight = Engine(model, max_batch_size=2), model.layers["0"].attention.v.weight
    kept = weight.detach().clone()
    weight.data.fill_(float("nan"))
    engine.add(Request(prompt_ids=[3] * 20))
    (event,) = engine.step()
    assert event.finish == "error" and isinstance(event.error, CheckpointError) and "NaN" in str(event.error)
    assert not engine.busy and engine.cache.bytes_in_use == 0
    weight.data.copy_(kept)
    assert events_alone(engine, request) == events_alone(Engine(model, max_batch_size=2), request)


def test_an_error_while_a_prompt_is_read_costs_nobody_else_a_token(make) -> None:
    """The newcomer is dismissed, and the other's token of that step comes with the next."""
    model, request = make(), Request(prompt_ids=[7, 8, 9], params=SamplingParams(seed=1, max_new_tokens=5))
    expected = [token for token, *_ in events_alone(Engine(model, max_batch_size=2), request)]
    engine = Engine(model, max_batch_size=2)
    first, found = engine.add(request), [engine.step()[0].token]
    read, engine.runner.prefill = engine.runner.prefill, lambda pieces: (_ for _ in ()).throw(MemoryError("none left"))
    engine.add(Request(prompt_ids=[5] * 4))
    with pytest.raises(MemoryError):
        engine.step()
    engine.runner.prefill = read
    while engine.busy:
        events = engine.step()
        assert {event.id for event in events} == {first}
        found += [event.token for event in events]
    assert found == expected and engine.cache.bytes_in_use == 0


def test_two_texts_are_not_streamed_from_one_engine_at_once(make) -> None:
    engine = Engine(make(), max_batch_size=2)
    one, two = (stream(engine, "Once", max_new_tokens=4, stop_at_eod=False) for _ in range(2))
    next(one)
    with pytest.raises(ConfigError, match="requests that others added"):
        next(two)
    list(one)
    assert not engine.busy and list(stream(engine, "Once", max_new_tokens=4))


def test_one_request_at_a_time_is_equal_to_rounding(make) -> None:
    """An engine of one row takes other matrix products than one of several."""
    model = make()
    for request in requests(random.Random(2), 5):
        one, many = (events_alone(Engine(model, max_batch_size=size), request) for size in (1, 4))
        assert [each[0] for each in one] == [each[0] for each in many]
        assert [each[1] for each in one] == pytest.approx([each[1] for each in many], abs=1e-4)
