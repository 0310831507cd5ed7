"""Engines of several processes: one that drives them, replicas, errors, seeds, and generation beside training."""

import os
import pathlib
import random
import time
from typing import Any

import pytest
import torch

from megalith.common.errors import CheckpointError, ConfigError
from megalith.config.run import RunConfig
from megalith.generation import beam
from megalith.generation import engine as engine_module
from megalith.generation.engine import Engine, Event, Request
from megalith.generation.generate import complete
from megalith.generation.model import TextModel
from megalith.generation.parallel.driver import Driver, follow
from megalith.generation.parallel.replicas import engine_of
from megalith.generation.parallel.runner import bytes_per_row
from megalith.generation.request import BeamRequest
from megalith.generation.runner import ModelRunner
from megalith.generation.sampling import SamplingParams
from megalith.optim.build import build_optimizer
from megalith.parallel.sharding import to_local
from megalith.runtime.build import Runtime
from megalith.testing import parity
from megalith.testing.ranks import run_ranks
from tests.generation.parallel.layouts import PROMPTS, config_of, mixed_requests, model_of, results, runtime_of

LAYOUT = "tp2 pp2"


def described(event: Event) -> tuple:
    return event.token, event.finish, [each.ids for each in event.beams]


def drive(config: RunConfig, seed: int) -> dict[int, tuple[Request | BeamRequest, list[tuple], bool]] | None:
    """On rank 0: requests that come and are cancelled at random, their events, and whether they were cancelled."""
    engine, rng = engine_of(runtime_of(config), max_batch_size=3), random.Random(seed)
    engine.text_model.eval()
    if torch.distributed.get_rank():
        follow(engine)
        return None
    arriving: list[Request | BeamRequest] = [*mixed_requests(prompt_logprobs=True) * 3]
    for number in (4, 9):
        search = BeamRequest(prompt_ids=PROMPTS[0], beam_width=2, num_samples=2, max_new_tokens=number)
        arriving.insert(number, search)
    given: dict[int, tuple[Request | BeamRequest, list[tuple], bool]] = {}
    with Driver(engine) as driver:
        while arriving or driver.busy:
            for _ in range(min(len(arriving), rng.choice((0, 0, 1, 3)))):
                request = arriving.pop()
                given[driver.add(request)] = request, [], False
            for event in driver.step():
                given[event.id][1].append(described(event))
            unfinished = [id for id, (_, events, gone) in given.items() if not (gone or (events and events[-1][1]))]
            if unfinished and rng.random() < 0.3:
                chosen = rng.choice(unfinished)
                given[chosen] = *given[chosen][:2], True
                assert driver.cancel(chosen) and not driver.cancel(chosen)
        with pytest.raises(ConfigError, match="at least one token"):  # of which the others do not learn
            driver.add(Request(prompt_ids=[]))
    return given


@pytest.mark.parametrize("layout", ["dp2", pytest.param(LAYOUT, marks=pytest.mark.slow),
                                    pytest.param("dp2 tp2", marks=pytest.mark.slow)])  # fmt: skip
def test_a_driven_engine_gives_each_request_what_it_gives_alone(layout: str) -> None:
    ranks, model = 4 if " " in layout else 2, model_of(config_of("learned"))
    given, *others = run_ranks(drive, ranks, config_of("learned", layout), 3)
    assert others == [None] * (ranks - 1) and len(given) == 17
    alone = Engine(model, max_batch_size=3)
    for request, events, cancelled in given.values():
        ((*expected,),) = results(alone, [request])
        expected = [described(event) for event in expected]
        assert events == (expected[: len(events)] if cancelled else expected)
    assert 1 < sum(cancelled for *_, cancelled in given.values()) < 12


def leave(config: RunConfig, path: str, dies: bool) -> str:
    """A driver that raises, or dies, after its first step."""
    engine = engine_of(runtime_of(config), max_batch_size=3)
    engine.text_model.eval()
    if torch.distributed.get_rank():
        try:
            follow(engine)
        except RuntimeError as error:
            pathlib.Path(path).write_text(str(error))
        return "followed"
    try:
        with Driver(engine) as driver:
            driver.add(Request(prompt_ids=[1, 2], params=SamplingParams(seed=1)))
            driver.step()
            if dies:
                os._exit(3)
            raise KeyError("of the driver")
    except KeyError:
        return "raised"


def test_a_driver_that_raises_or_dies_leaves_nobody_waiting(tmp_path: pathlib.Path) -> None:
    config, file, start = config_of("learned", "pp2"), tmp_path / "error", time.monotonic()
    assert run_ranks(leave, 2, config, str(file), False) == ["raised", "followed"] and not file.exists()
    with pytest.raises(RuntimeError, match="rank 0 of 2 died with exit code 3"):
        run_ranks(leave, 2, config, str(file), True)
    assert file.read_text() and time.monotonic() - start < 60


def failing(config: RunConfig) -> tuple[list[str], list[list[tuple]], bool]:
    """Errors that a request of seed 13 causes with its third token, where that is drawn, and the events of all."""
    original = engine_module.sample

    def sample(logits: torch.Tensor, states: list) -> torch.Tensor:
        if any(state.params.seed == 13 and len(state.new_ids) == 2 for state in states):
            raise CheckpointError("NaN, says the test")
        return original(logits, states)

    engine_module.sample = sample
    engine = engine_of(runtime_of(config), max_batch_size=4)
    engine.text_model.eval()
    params = [SamplingParams(max_new_tokens=6, seed=seed) for seed in (1, 13, 2, 3)]
    ids, events = [engine.add(Request(prompt_ids=[7, 8], params=each)) for each in params], list[Event]()
    try:
        while engine.busy:
            events += engine.step()
    finally:
        engine_module.sample = original
    errors = [str(event.error) for event in events if event.error is not None]
    return errors, [[event.token for event in events if event.id == id] for id in ids], engine.cancel(ids[1])


@pytest.mark.parametrize("layout", ["pp2", "dp2"])
def test_a_request_that_fails_does_so_on_all_processes_and_costs_nobody_else_a_token(layout: str) -> None:
    model = model_of(config_of("learned"))
    expected = [
        [event.token for event in events]
        for events in results(Engine(model, max_batch_size=4), [
            Request(prompt_ids=[7, 8], params=SamplingParams(max_new_tokens=6, seed=seed)) for seed in (1, 13, 2, 3)
        ])
    ]  # fmt: skip
    expected[1] = [*expected[1][:2], None]
    (errors, tokens, cancelled), second = run_ranks(failing, 2, config_of("learned", layout))
    assert second == (errors, tokens, cancelled) and tokens == expected and not cancelled
    assert len(errors) == 1 and "not numbers" in errors[0]


def damaged(config: RunConfig) -> tuple[str, list[list[int | None]]]:
    """The error of a prompt with a token that is damaged, and what those get that were there before and come after."""
    runtime, token = runtime_of(config), 33
    for stage in runtime.stages:
        if (embedding := stage.model.embedding) is not None:
            local, row = to_local(embedding.weight.detach()), token - getattr(embedding, "first", 0)
            if 0 <= row < len(local):
                local[row] = float("nan")
    engine, params = engine_of(runtime, max_batch_size=4), SamplingParams(max_new_tokens=6, temperature=0.0)
    engine.text_model.eval()
    ids, events = [engine.add(Request(prompt_ids=[7, 8], params=params))], engine.step()
    bad = [engine.add(Request(prompt_ids=[7, token], params=params))]
    bad.append(engine.add(BeamRequest(prompt_ids=[7, token], beam_width=2, num_samples=1, max_new_tokens=3)))
    events += engine.step()
    ids.append(engine.add(Request(prompt_ids=[7, 8], params=params)))
    while engine.busy:
        events += engine.step()
    (error,) = {str(event.error) for event in events if event.id in bad}
    return error, [[event.token for event in events if event.id == id] for id in ids]


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_a_prompt_with_damaged_weights_is_dismissed_on_all_processes(layout: str) -> None:
    (error, tokens), second = run_ranks(damaged, 2, config_of("alibi", layout))
    assert second == (error, tokens) and "not numbers (NaN" in error
    assert tokens[0] == tokens[1] and len(tokens[0]) == 6


def without_memory(config: RunConfig) -> tuple[list[str], list[int | None]]:
    """The errors of two searches, one on each replica, the first of which has no memory; the tokens of a request."""
    engine, runner_of = engine_of(runtime_of(config), max_batch_size=4), beam.runner_of
    engine.text_model.eval()

    def allocate(*arguments: Any, **options: Any) -> ModelRunner:
        if torch.distributed.get_rank() == 0:
            raise torch.OutOfMemoryError("none left")
        return runner_of(*arguments, **options)

    beam.runner_of = allocate
    searches = [BeamRequest(prompt_ids=[7, 8], beam_width=2, num_samples=1, max_new_tokens=3)] * 2
    ids, events = [engine.add(each) for each in searches], list[Event]()
    other = engine.add(Request(prompt_ids=[7, 8], params=SamplingParams(max_new_tokens=6, seed=1)))
    try:
        while engine.busy:
            events += engine.step()
    finally:
        beam.runner_of = runner_of
    return [str(event.error or "") for event in events if event.id in ids], [
        event.token for event in events if event.id == other
    ]


def test_a_replica_without_memory_for_a_search_goes_on() -> None:
    first, second = run_ranks(without_memory, 2, config_of("alibi", "dp2"))
    errors, tokens = first
    assert first == second and len(tokens) == 6 and None not in tokens
    assert len(errors) == 2 and sum("too little for 2 beams of 5 tokens" in each for each in errors) == 1


def without_seeds(config: RunConfig) -> list[list[int]]:
    prompts = [[5, 6]] * 3
    return [each.ids for each in complete(runtime_of(config), prompts, max_new_tokens=12, stop_at_eod=False)]


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_seeds_that_nobody_gave_are_the_same_on_all_processes(layout: str) -> None:
    first, second = run_ranks(without_seeds, 2, config_of("alibi", layout))
    assert first == second and len(set(map(tuple, first))) == 3


def limits(config: RunConfig) -> tuple[int, int, str]:
    model = TextModel.of(runtime_of(config))
    row = bytes_per_row(model, 64, 64)
    engine = Engine(model, max_length=64, max_cache_bytes=3 * row)
    with pytest.raises(ConfigError, match="must be in evaluation mode"):
        engine.runner.decode([0], [1], [0], [1])
    return row, engine.max_batch_size, engine.cache.bytes_allocated


def test_processes_with_different_stages_agree_on_the_rows_of_their_caches() -> None:
    """The process of the encoder alone keeps nothing."""
    row = 2 * 2 * 2 * 64 * 32 * 4  # keys and values, layers, self and cross attention, positions, hidden, bytes
    assert run_ranks(limits, 2, config_of("t5", "pp2")) == [(row, 3, 0), (row, 3, 3 * row)]


TRAININGS: dict[str, dict[str, Any]] = {
    "tp2 with sequence parallelism": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "zero bubble": {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv", "global_batch_size": 4},
    "ZeRO-2": {"use_distributed_optimizer": True},
    "ZeRO-3": {"data_parallel_sharding": "full", "recompute_granularity": "full"},
    "ZeRO-3 in bfloat16": {"data_parallel_sharding": "full", "bf16": True},
    "bfloat16": {"bf16": True, "recompute_granularity": "selective"},
    "compiled": {"compile": True, "num_layers": 1},
    "ZeRO-3 tp2": {"data_parallel_sharding": "full", "tensor_model_parallel_size": 2},
    "ZeRO-2 pp2": {"use_distributed_optimizer": True, "pipeline_model_parallel_size": 2},
}
FAST = ("tp2 with sequence parallelism", "ZeRO-3 in bfloat16")


def train(config: RunConfig, generates: bool) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """Weights after two steps, and texts after the first and after the second, by one engine.

    It must not use what its rows hold of the prompts from before the second step.
    """
    runtime, texts = runtime_of(config), list[list[int]]()
    engine = engine_of(runtime, max_batch_size=4, max_length=32)
    optimizer = build_optimizer(config.optimizer, runtime.named_parameters())
    for step in range(2):
        parity.forward_backward_once(runtime, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if generates:
            before = state_of(runtime)
            texts += [each.ids for each in complete(engine, [[5, 9], [25]], temperature=0.0, max_new_tokens=5)]
            assert state_of(runtime) == before
    return {name: parity.full_tensor(tensor) for name, tensor in runtime.named_parameters()}, texts


def state_of(runtime: Runtime) -> list[tuple]:
    """What generation could leave behind: modes, attributes, other parameters than those that the optimizer has."""
    modules = [module for stage in runtime.stages for module in stage.model.modules()]
    return [(each.training, sorted(vars(each)), [id(p) for p in each._parameters.values()]) for each in modules]


@pytest.mark.timeout(900)  # compiled, on cores that others use
@pytest.mark.parametrize("case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow)
                                  for case in TRAININGS])  # fmt: skip
def test_generation_between_training_steps_changes_nothing(case: str) -> None:
    ranks = 4 if case[-4:-1] in (" tp", " pp") else 2
    config = config_of("rope, one key head").replace(seq_length=32, lr=0.01, **TRAININGS[case])
    expected, found = (run_ranks(train, ranks, config, generates, timeout=400) for generates in (False, True))
    weights = {name: tensor for tensors, _ in found for name, tensor in tensors.items()}
    for (tensors, _), (others, texts) in zip(expected, found):
        assert texts == found[0][1] and tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    model = model_of(config, torch.bfloat16 if config.precision.bf16 else torch.float32)
    assert not torch.equal(model.get_parameter("layers.0.mlp.up.weight"), weights["layers.0.mlp.up.weight"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    last = [each.ids for each in complete(model, [[5, 9], [25]], temperature=0.0, max_new_tokens=5)]
    assert last == found[0][1][2:] and len(found[0][1]) == 4
