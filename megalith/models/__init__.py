"""Whole models, maths only: they know of one process, and of nothing that splits them."""

from megalith.common.registry import Registry

MODELS = Registry("model", {"gpt": "megalith.models.gpt:GPT", "bert": "megalith.models.bert:BERT", "t5": "megalith.models.t5:T5"})
