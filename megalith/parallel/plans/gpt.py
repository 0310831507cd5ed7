"""The plan and the stages of GPT, for all its forms: what a form lacks is passed over.

LAYERS is the plan of every model of such layers.
"""

from __future__ import annotations

from megalith.parallel.pipeline.cut import Stages
from megalith.parallel.plan import Plan
from megalith.parallel.styles import (
    column,
    copy,
    core,
    head,
    head_norm,
    heads,
    part_dropout,
    part_embedding,
    row,
    shared_input,
    vocabulary,
    vocabulary_loss,
)

LAYERS: Plan = {
    "layers.*.attention_norm": copy,
    "layers.*.attention.core": core,  # before q, whose heads it counts
    "layers.*.attention.shared_input": shared_input,
    "layers.*.attention.q": heads,
    "layers.*.attention.k": heads,
    "layers.*.attention.v": heads,
    "layers.*.attention.q_norm": head_norm,
    "layers.*.attention.k_norm": head_norm,
    "layers.*.attention.out": row,
    "layers.*.attention_dropout": part_dropout,
    "layers.*.mlp_norm": copy,
    "layers.*.mlp.shared_input": shared_input,
    "layers.*.mlp.gate": column,
    "layers.*.mlp.up": column,
    "layers.*.mlp.down": row,
    "layers.*.mlp_dropout": part_dropout,
}
PLAN: Plan = {
    "embedding": vocabulary,
    "position_embedding": part_embedding,
    "embedding_norm": copy,
    "embedding_dropout": part_dropout,
    **LAYERS,
    "final_norm": copy,
    "head": head,
    "token_loss": vocabulary_loss,
}
STAGES = Stages(("embedding", "position_embedding", "embedding_norm"), ("final_norm", "head"))
