"""The plan and the stages of Retro: those of GPT, with cross attention, and an encoder inside one of the layers."""

from __future__ import annotations

from megalith.config.sections.model import ModelConfig
from megalith.parallel.pipeline.split import PipelinePlan
from megalith.parallel.plan import Plan
from megalith.parallel.plans import gpt, t5
from megalith.parallel.styles import replicated_norm, sequence_parallel_dropout, shared_input

# Each layer gathers the encoder's output for itself, and again in the backward pass: gathered once for all of them, as
# T5's, it would be kept whole, and is several times as large as the text's hidden states.
CROSS: Plan = {**t5.CROSS, "layers.*.cross_attention.memory_input": shared_input}
PLAN: Plan = {
    **gpt.PLAN,
    **CROSS,
    **{name.replace("layers.*", "layers.*.encoder.layers.*"): style for name, style in {**gpt.LAYERS, **CROSS}.items()},
    "layers.*.encoder.norm": replicated_norm,
    "neighbor_dropout": sequence_parallel_dropout,
}


def received(layer: int, model: ModelConfig) -> tuple[str, ...]:
    """Between the first retrieval layer and the last also the encoded neighbours.

    They are k r / m times as large as the text's hidden states: 4 times with Megatron's sizes.
    """
    first, last = model.retrieval_layers[0], model.retrieval_layers[-1]
    return ("inputs", "neighbor_tokens") if first < layer <= last else ("inputs",)


def embeds(model: ModelConfig) -> tuple[int, int]:
    """The layers beside which tokens are embedded: the text's, and the neighbours'."""
    return 0, model.retrieval_layers[0]


STAGES = PipelinePlan(
    (), gpt.STAGES.last, dict.fromkeys(("embedding", "position_embedding", "embedding_norm"), embeds), received
)
