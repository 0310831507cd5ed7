"""The plan and the stages of T5, for all its forms: what a form lacks is passed over."""

from __future__ import annotations

from megalith.config.sections.model import ModelConfig
from megalith.parallel.pipeline.cut import Stages
from megalith.parallel.plan import Plan
from megalith.parallel.plans.gpt import LAYERS
from megalith.parallel.styles import (
    copy,
    core,
    head,
    head_table,
    heads,
    part_dropout,
    part_embedding,
    row,
    shared_input,
    vocabulary,
    vocabulary_loss,
    whole,
    whole_input,
)

PLAN: Plan = {
    "embedding": vocabulary,
    "position_embedding": part_embedding,
    "encoder_dropout": part_dropout,
    "decoder_dropout": part_dropout,
    "encoder_bias": head_table,
    "decoder_bias": head_table,
    **LAYERS,
    "layers.*.cross_norm": copy,
    "layers.*.cross_attention.core": core,  # before q, whose heads it counts
    "layers.*.cross_attention.shared_input": shared_input,
    "layers.*.cross_attention.shared_memory": whole_input,
    "layers.*.cross_attention.q": heads,
    "layers.*.cross_attention.k": heads,
    "layers.*.cross_attention.v": heads,
    "layers.*.cross_attention.out": row,
    "layers.*.cross_dropout": part_dropout,
    "encoder_norm": copy,
    "memory": whole,
    "final_norm": copy,
    "head": head,
    "token_loss": vocabulary_loss,
}


def received(layer: int, model: ModelConfig) -> tuple[str, ...]:
    """Inside the decoder the encoder's output rides along."""
    return ("inputs", "decoder_input_ids") if layer > model.num_layers else ("inputs",)


STAGES = Stages(
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
