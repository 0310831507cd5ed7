"""The plan and the stages of GPT, for all its forms: modules that a form lacks are skipped.

LAYERS is the plan of every model of such layers.
"""

from __future__ import annotations

from megalith.parallel.pipeline.split import PipelinePlan
from megalith.parallel.plan import Plan
from megalith.parallel.styles import (
    column,
    core_attention,
    heads,
    lm_head,
    per_head_norm,
    replicated_norm,
    row,
    sequence_parallel_dropout,
    sequence_parallel_embedding,
    shared_input,
    vocab_parallel_embedding,
    vocab_parallel_loss,
)

LAYERS: Plan = {
    "layers.*.attention_norm": replicated_norm,
    "layers.*.attention.core": core_attention,  # before q, whose heads it counts
    "layers.*.attention.shared_input": shared_input,
    "layers.*.attention.q": heads,
    "layers.*.attention.k": heads,
    "layers.*.attention.v": heads,
    "layers.*.attention.q_norm": per_head_norm,
    "layers.*.attention.k_norm": per_head_norm,
    "layers.*.attention.out": row,
    "layers.*.attention_dropout": sequence_parallel_dropout,
    "layers.*.mlp_norm": replicated_norm,
    "layers.*.mlp.shared_input": shared_input,
    "layers.*.mlp.gate": column,
    "layers.*.mlp.up": column,
    "layers.*.mlp.down": row,
    "layers.*.mlp_dropout": sequence_parallel_dropout,
}
PLAN: Plan = {
    "embedding": vocab_parallel_embedding,
    "position_embedding": sequence_parallel_embedding,
    "embedding_norm": replicated_norm,
    "embedding_dropout": sequence_parallel_dropout,
    **LAYERS,
    "final_norm": replicated_norm,
    "head": lm_head,
    "token_loss": vocab_parallel_loss,
}
STAGES = PipelinePlan(("embedding", "position_embedding", "embedding_norm"), ("final_norm", "head"))
