"""The plan and the stages of BERT with a classification or a multiple-choice head."""

from __future__ import annotations

from megalith.parallel.pipeline.split import PipelinePlan
from megalith.parallel.plan import Plan
from megalith.parallel.plans.bert import ENCODER, FIRST
from megalith.parallel.styles import replicated_linear

PLAN: Plan = {**ENCODER, "pooler": replicated_linear, "classifier": replicated_linear}
STAGES = PipelinePlan(FIRST, ("final_norm", "pooler", "classifier"))
