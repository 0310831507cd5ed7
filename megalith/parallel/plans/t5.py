"""The plan and the stages of T5, for all its forms: modules that a form lacks are skipped."""

from __future__ import annotations

from megalith.config.sections.model import ModelConfig
from megalith.parallel.pipeline.split import PipelinePlan
from megalith.parallel.plan import Plan
from megalith.parallel.plans.gpt import LAYERS
from megalith.parallel.styles import (
    copy_to_region,
    core_attention,
    heads,
    lm_head,
    relative_bias,
    replicated_norm,
    row,
    sequence_parallel_dropout,
    sequence_parallel_embedding,
    shared_input,
    shared_input_in_region,
    vocab_parallel_embedding,
    vocab_parallel_loss,
)

CROSS: Plan = {
    "layers.*.cross_norm": replicated_norm,
    "layers.*.cross_attention.core": core_attention,  # before q, whose heads it counts
    "layers.*.cross_attention.shared_input": shared_input,
    "layers.*.cross_attention.memory_input": shared_input_in_region,
    "layers.*.cross_attention.q": heads,
    "layers.*.cross_attention.k": heads,
    "layers.*.cross_attention.v": heads,
    "layers.*.cross_attention.out": row,
    "layers.*.cross_dropout": sequence_parallel_dropout,
}
PLAN: Plan = {
    "embedding": vocab_parallel_embedding,
    "position_embedding": sequence_parallel_embedding,
    "encoder_dropout": sequence_parallel_dropout,
    "decoder_dropout": sequence_parallel_dropout,
    "encoder_bias": relative_bias,
    "decoder_bias": relative_bias,
    **LAYERS,
    **CROSS,
    "encoder_norm": replicated_norm,
    "memory": copy_to_region,
    "final_norm": replicated_norm,
    "head": lm_head,
    "token_loss": vocab_parallel_loss,
}


def received(layer: int, model: ModelConfig) -> tuple[str, ...]:
    """Inside the decoder also the output of the encoder, as `inputs`."""
    return ("inputs", "decoder_input_ids") if layer > model.num_layers else ("inputs",)


STAGES = PipelinePlan(
    (),
    ("final_norm", "head"),
    {
        "embedding": lambda model: (0, model.num_layers),
        "position_embedding": lambda model: (0, model.num_layers),
        "encoder_bias": lambda model: range(model.num_layers),
        "encoder_norm": lambda model: (model.num_layers - 1,),
        "decoder_bias": lambda model: range(model.num_layers, model.all_layers),
    },
    received,
)
