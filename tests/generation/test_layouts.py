"""Texts do not depend on the layout: greedy, sampled, with beams, and log-probabilities, of GPT and T5."""

from typing import Any

import pytest
import torch

from megalith.config.run import RunConfig
from megalith.generation.beam import beam_search
from megalith.generation.cached_attention import PrefillChunk
from megalith.generation.engine import Engine, Event, Request
from megalith.generation.generate import complete, score
from megalith.generation.model import TextModel
from megalith.generation.parallel.replicas import engine_of
from megalith.generation.parallel.runner import runner_of
from megalith.generation.sampling import SamplingParams
from megalith.runtime.build import Runtime, build_model, build_runtime, init_mesh
from megalith.testing.ranks import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
    "cp2": {"context_parallel_size": 2},
    "virtual": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    "zbv": {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv"},
    "tp2 pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "dp2 tp2": {"tensor_model_parallel_size": 2},
}
FORMS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rope, one key head": {"position_embedding_type": "rope", "num_query_groups": 1, "normalization": "RMSNorm"},
    "alibi": {"position_embedding_type": "alibi"},
    "t5": {"model_type": "t5", "num_layers": 2, "decoder_num_layers": 2},
    "t5, relative": {"model_type": "t5", "num_layers": 2, "decoder_num_layers": 2, "add_bias_linear": False,
                     "position_embedding_type": "relative", "normalization": "RMSNorm"},
}  # fmt: skip
PROMPTS = [[5, 9, 20, 17, 3], [25], list(range(40, 60)), list(range(90)) + list(range(70))]


class Numbers:
    """A tokenizer of a text's code points."""

    eos = eod = decoder_start = 0
    vocab_size = 99  # not a multiple of the ranks

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(32 + i) for i in ids)


def config_of(form: str, layout: str = "") -> RunConfig:
    """Weights so large that the likeliest token is clear."""
    base = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": Numbers.vocab_size,
            "max_position_embeddings": 200, "init_method_std": 0.3, "micro_batch_size": 1, "global_batch_size": 2,
            "hidden_dropout": 0.1, "seq_length": 200, "pipeline_split": "even", "device": "cpu"}  # fmt: skip
    return RunConfig().replace(**base | FORMS[form] | LAYOUTS.get(layout, {}))


def runtime_of(config: RunConfig, dtype: torch.dtype = torch.float32) -> Runtime:
    return build_runtime(config, init_mesh(config.parallel), dtype)


def model_of(config: RunConfig, dtype: torch.dtype = torch.float32) -> TextModel:
    """The whole model on one process, with the weights that every layout has."""
    return TextModel(build_model(config.model, torch.device("cpu"), dtype, seed=config.batch.seed), Numbers())


def mixed_requests(prompt_logprobs: bool) -> list[Request]:
    """Requests of all settings."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": True}, {"temperature": 1.2}, {"top_k": 20, "top_logprobs": 3},
        {"top_p": 0.9, "prompt_logprobs": prompt_logprobs}, {"temperature": 0.7, "top_k": 50, "top_p": 0.8},
    ]  # fmt: skip
    return [
        Request(prompt_ids=PROMPTS[number % 4], index=number,
                params=SamplingParams(max_new_tokens=3 + number, seed=number, stop_token_ids=(7,), **way))
        for number, way in enumerate(ways)
    ]  # fmt: skip


def results(engine: Any, requests: list[Request]) -> list[list[Event]]:
    """The events of each request; all are there from the start."""
    numbers, events = {engine.add(request): number for number, request in enumerate(requests)}, [[] for _ in requests]
    while engine.busy:
        for event in engine.step():
            events[numbers[event.id]].append(event)
    return events


def generated(model: TextModel) -> dict[str, Any]:
    """What the functions give that users call."""
    t5 = bool(model.config.decoder_layers)
    found = {
        "greedy": [(each.ids, each.logprobs) for each in complete(
            model, PROMPTS, temperature=0, max_new_tokens=9, logprobs=True, batch_size=3)],
        "beams": [(each.ids, [each.score]) for each in beam_search(model, PROMPTS[0], beam_width=3, max_new_tokens=5)],
        "scores": [] if t5 else score(model, PROMPTS, batch_size=3),
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
    for name in ("greedy", "beams"):
        assert [ids for ids, _ in found[name]] == [ids for ids, _ in expected[name]], name
        for (_, values), (_, true) in zip(found[name], expected[name]):
            assert values == pytest.approx(true, abs=1e-4), name
    for values, true in zip(found["scores"], expected["scores"], strict=True):
        assert values == pytest.approx(true, abs=1e-4)
    for events, true in zip(found["sampled"], expected["sampled"], strict=True):
        assert [(e.token, e.finish) for e in events] == [(e.token, e.finish) for e in true]
        assert numbers_of(events) == pytest.approx(numbers_of(true), abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_texts_are_those_of_one_process(form: str, layout: str) -> None:
    expected = generated(model_of(config_of(form)))
    assert len({tuple(ids) for ids, _ in expected["greedy"]}) > 2  # not all the same token
    ranks = 4 if " " in layout else 2
    found = run_ranks(generated_by_ranks, ranks, config_of(form, layout))
    check_equal(found[0], expected)
    for other in found[1:]:  # to the last bit
        assert other == found[0]
