"""Texts do not depend on the layout: greedy, sampled, with beams, and log-probabilities, of GPT and T5."""

from typing import Any

import pytest
import torch

from megalith.config.run import RunConfig
from megalith.generation.beam import beam_search
from megalith.generation.cached_attention import PrefillChunk
from megalith.generation.engine import Engine, Event
from megalith.generation.generate import complete, score
from megalith.generation.model import TextModel
from megalith.generation.parallel.replicas import engine_of
from megalith.generation.parallel.runner import runner_of
from megalith.generation.tensors import generate_tokens
from megalith.testing.ranks import run_ranks
from tests.generation.parallel.layouts import (
    FORMS,
    LAYOUTS,
    PROMPTS,
    Numbers,
    config_of,
    mixed_requests,
    model_of,
    results,
    runtime_of,
)


def generated(model: TextModel) -> dict[str, Any]:
    """What the functions give that users call."""
    t5 = bool(model.config.decoder_layers)
    found = {
        "greedy": [(each.ids, each.logprobs) for each in complete(
            model, PROMPTS, temperature=0, max_new_tokens=9, logprobs=True, batch_size=3)],
        "beams": [(each.ids, [each.score]) for each in beam_search(model, PROMPTS[0], beam_width=3, max_new_tokens=5)],
        "scores": [] if t5 else score(model, PROMPTS, batch_size=3),
        "tensor": [] if t5 else generate_tokens(
            model, torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]), max_new_tokens=5,
            top_k=5).tolist(),
    }  # fmt: skip
    with model.evaluating():
        found["sampled"] = results(engine_of(model, max_batch_size=3), mixed_requests(prompt_logprobs=not t5))
    return found


def generated_by_ranks(config: RunConfig) -> dict[str, Any]:
    runtime = runtime_of(config)
    runtime.train()
    model = TextModel(runtime.stages[0].model, Numbers(), runtime=runtime)
    found = generated(model)
    assert all(module.training for stage in runtime.stages for module in stage.model.modules())
    assert all(axis.sequence_parallel for axis in runtime.sequence_axes)
    assert bool(runtime.sequence_axes) == config.parallel.sequence_parallel
    return found


def numbers_of(events: list[Event]) -> list[float]:
    """All log-probabilities in events."""
    found = list[float]()
    for event in events:
        found += [] if event.logprob is None else [event.logprob]
        found += [value for _, value in event.top_logprobs]
        found += [] if event.prompt is None else event.prompt.logprobs
    return found


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Tokens exactly, log-probabilities to 1e-4 (float32)."""
    assert found.keys() == expected.keys()
    assert found["tensor"] == expected["tensor"]
    for name in ("greedy", "beams"):
        assert [ids for ids, _ in found[name]] == [ids for ids, _ in expected[name]], name
        for (_, values), (_, true) in zip(found[name], expected[name]):
            assert values == pytest.approx(true, abs=1e-4), name
    for values, true in zip(found["scores"], expected["scores"], strict=True):
        assert values == pytest.approx(true, abs=1e-4)
    for events, true in zip(found["sampled"], expected["sampled"], strict=True):
        assert [(e.token, e.finish) for e in events] == [(e.token, e.finish) for e in true]
        assert numbers_of(events) == pytest.approx(numbers_of(true), abs=1e-4)


FAST = {("learned", "tp2"), ("rope, one key head", "tp2 pp2"), ("alibi", "zbv"), ("learned", "dp2"), ("t5", "virtual")}
CASES = [
    pytest.param(form, layout, marks=() if (form, layout) in FAST else pytest.mark.slow)
    for form in FORMS
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("form", "layout"), CASES)
def test_texts_are_those_of_one_process(form: str, layout: str) -> None:
    expected = generated(model_of(config_of(form)))
    assert len({tuple(ids) for ids, _ in expected["greedy"]}) > 2  # not all the same token
    ranks = 4 if " " in layout else 2
    found = run_ranks(generated_by_ranks, ranks, config_of(form, layout))
    check_equal(found[0], expected)
    for other in found[1:]:  # to the last bit
        assert other == found[0]


def logits_and_losses(config: RunConfig) -> tuple[torch.Tensor | None, list[float], list[float], list[int]]:
    """In float64: logits of a prompt and of four greedy steps, where they are; log-probabilities of a text by the
    engine and by the forward pass of training, in this layout; stages that this process runs.
    """
    runtime = runtime_of(config, torch.float64)
    model = TextModel.of(runtime)
    runner, (prompt, *_), made = runner_of(model, 2, 64), PROMPTS, []
    with runtime.evaluating():
        made.append(runner.prefill([PrefillChunk(0, prompt)]))
        for step in range(4):
            (token,) = runner.broadcast(lambda: made[-1].argmax(dim=-1).double(), (1,)).tolist()
            made.append(runner.decode([0], [int(token)], [len(prompt) + step]))
    logits = None if made[0] is None else torch.stack(made)
    assert (logits is not None) == runtime.has_last_stage
    (scores,), ids, found = score(model, [PROMPTS[3]]), torch.tensor([PROMPTS[3]]), []

    def losses(output: torch.Tensor, number: int) -> torch.Tensor:
        found.extend(output[0, :-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0].tolist())
        return output.sum()

    with torch.no_grad():
        runtime.train(False)
        runtime.run([{"inputs": ids}] * 2, losses, train=False)
    return logits, scores, found[: len(scores)], [stage.stage_index for stage in runtime.stages]


@pytest.mark.parametrize("layout", ["tp2", pytest.param("virtual", marks=pytest.mark.slow),
                                    pytest.param("tp2 pp2", marks=pytest.mark.slow)])  # fmt: skip
def test_logits_are_those_of_one_process_and_of_training(layout: str) -> None:
    form = "rope, one key head"
    config, ranks = config_of(form, layout), 4 if " " in layout else 2
    ((expected, scores, losses, _),) = run_ranks(logits_and_losses, 1, config_of(form))
    assert scores == pytest.approx(losses, abs=1e-5) and len(scores) == len(PROMPTS[3]) - 1
    found = run_ranks(logits_and_losses, ranks, config)
    assert sum(logits is not None for logits, *_ in found) == config.parallel.tensor_model_parallel_size
    for logits, values, training, _ in found:
        if logits is not None:
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
            assert values == pytest.approx(training, abs=1e-5)
        assert values == pytest.approx(scores, abs=1e-6)
    assert sorted(stage for *_, stages in found for stage in stages) == sorted(
        [*range({"virtual": 4}.get(layout, config.parallel.pipeline_model_parallel_size))]
        * config.parallel.tensor_model_parallel_size
    )


def compiled(config: RunConfig) -> list[list[Event]]:
    model = TextModel.of(runtime_of(config)).eval()
    engine = engine_of(model, max_batch_size=3, compile=True)
    engine.warm_up()
    with torch.compiler.set_stance("fail_on_recompile"):
        return results(engine, mixed_requests(prompt_logprobs=True))


@pytest.mark.slow
@pytest.mark.timeout(900)  # a compiler on cores that others use
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_compiled_steps(layout: str) -> None:
    expected = results(Engine(model_of(config_of("learned")), max_batch_size=3), mixed_requests(prompt_logprobs=True))
    first, second = run_ranks(compiled, 2, config_of("learned", layout), timeout=880)
    assert first == second
    for events, true in zip(first, expected, strict=True):
        assert [event.token for event in events] == [event.token for event in true]
