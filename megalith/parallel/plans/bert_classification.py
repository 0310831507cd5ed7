"""The plan and the stages of BERT with a classification or a multiple-choice head."""

from __future__ import annotations

from megalith.parallel.pipeline.cut import Stages
from megalith.parallel.plan import Plan
from megalith.parallel.plans.bert import ENCODER, FIRST
from megalith.parallel.styles import whole_linear

PLAN: Plan = {**ENCODER, "pooler": whole_linear, "classifier": whole_linear}
STAGES = Stages(FIRST, ("final_norm", "pooler", "classifier"))
