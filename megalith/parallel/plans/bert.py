"""The plan and the stages of BERT, for both of its forms: modules that a form lacks are skipped."""

from __future__ import annotations

from megalith.parallel.pipeline.split import PipelinePlan
from megalith.parallel.plan import Plan
from megalith.parallel.plans.gpt import LAYERS
from megalith.parallel.styles import (
    first_token,
    lm_head,
    replicated_linear,
    replicated_norm,
    sequence_parallel_dropout,
    sequence_parallel_embedding,
    sequence_parallel_linear,
    vocab_parallel_embedding,
    vocab_parallel_loss,
)

EMBEDDINGS: Plan = {
    "embedding": vocab_parallel_embedding,
    "position_embedding": sequence_parallel_embedding,
    "token_type_embedding": sequence_parallel_embedding,
    "embedding_norm": replicated_norm,
    "embedding_dropout": sequence_parallel_dropout,
}
ENCODER: Plan = {  # of every model with a BERT in it
    **EMBEDDINGS,
    **LAYERS,
    "final_norm": replicated_norm,
    "first_token": first_token,
}
PLAN: Plan = {
    **ENCODER,
    "head_dense": sequence_parallel_linear,
    "head_norm": replicated_norm,
    "head": lm_head,
    "token_loss": vocab_parallel_loss,
    "pooler": replicated_linear,
    "order_head": replicated_linear,
}
FIRST = ("embedding", "position_embedding", "token_type_embedding", "embedding_norm")
STAGES = PipelinePlan(FIRST, ("final_norm", "head_dense", "head_norm", "head", "pooler", "order_head"))
