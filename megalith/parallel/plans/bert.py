"""The plan and the stages of BERT, for both of its forms: what a form lacks is passed over."""

from __future__ import annotations

from megalith.parallel.pipeline.cut import Stages
from megalith.parallel.plan import Plan
from megalith.parallel.plans.gpt import LAYERS
from megalith.parallel.styles import (
    copy,
    first_token,
    head,
    part_dropout,
    part_embedding,
    part_linear,
    vocabulary,
    vocabulary_loss,
    whole_linear,
)

ENCODER: Plan = {  # of every model with a BERT in it
    "embedding": vocabulary,
    "position_embedding": part_embedding,
    "token_type_embedding": part_embedding,
    "embedding_norm": copy,
    "embedding_dropout": part_dropout,
    **LAYERS,
    "final_norm": copy,
    "first_token": first_token,
}
PLAN: Plan = {
    **ENCODER,
    "head_dense": part_linear,
    "head_norm": copy,
    "head": head,
    "token_loss": vocabulary_loss,
    "pooler": whole_linear,
    "order_head": whole_linear,
}
FIRST = ("embedding", "position_embedding", "token_type_embedding", "embedding_norm")
STAGES = Stages(FIRST, ("final_norm", "head_dense", "head_norm", "head", "pooler", "order_head"))
