"""The plan and the stages of a bi-encoder: those of a BERT, for each of its towers."""

from __future__ import annotations

from megalith.parallel.pipeline.split import PipelinePlan
from megalith.parallel.plan import Plan
from megalith.parallel.plans.bert import EMBEDDINGS
from megalith.parallel.plans.gpt import LAYERS
from megalith.parallel.styles import first_token, replicated_linear, replicated_norm

TOWERS = ("query", "context")
PLAN: Plan = {
    pattern: style
    for tower in TOWERS
    for pattern, style in {
        **{f"{tower}_embeddings.{name}": style for name, style in EMBEDDINGS.items()},
        **{name.replace("layers.*", f"layers.*.{tower}"): style for name, style in LAYERS.items()},
        f"{tower}_head.final_norm": replicated_norm,
        f"{tower}_head.first_token": first_token,
        f"{tower}_head.projection": replicated_linear,
    }.items()
}
STAGES = PipelinePlan(
    tuple(f"{tower}_embeddings" for tower in TOWERS),
    tuple(f"{tower}_head" for tower in TOWERS),
    received=lambda layer, model: ("inputs", "context_ids"),
)
