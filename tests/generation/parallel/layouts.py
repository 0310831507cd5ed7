"""Models and requests in many layouts, for the tests of this folder."""

from typing import Any

import torch

from megalith.config.run import RunConfig
from megalith.generation.engine import Event, Request
from megalith.generation.model import TextModel
from megalith.generation.sampling import SamplingParams
from megalith.runtime.build import Runtime, build_model, build_runtime, init_mesh

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
    "learned": {"untie_embeddings_and_output_weights": False},
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
            "untie_embeddings_and_output_weights": True, "hidden_dropout": 0.1, "seq_length": 200,
            "pipeline_split": "even", "device": "cpu"}  # fmt: skip
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
