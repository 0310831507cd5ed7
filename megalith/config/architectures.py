"""What a model is, in one record: everything that differs between models is asked of it, and no other code tells them
apart.

    architecture("gpt"), architecture("my_models:Twist")     # a record, or a class that carries one as `architecture`
    config.model.architecture.find("plan")                   # what an address of the record names

A record holds addresses ("module:name"), so that it needs no torch; they are imported when asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import ConfigError, problem
from megalith.common.registry import Registry, load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model and all that belongs to it.

    Fields are addresses, but for names of registries (dataset, loss, tokenizer_type) and switches.

    name: the name of a run where nothing else names it.
    model: an nn.Module made by Model(config.model, seed) that offers what models/protocol.py says.
    plan: its tensor-parallel plan (parallel/plan.py).
    stages: what its pipeline stages have (parallel/pipeline/split.py: PipelinePlan).
    shapes: ModelConfig -> {parameter: shape}, a shared parameter once, without torch.
    kinds: {parameter: ParameterKind} for every parameter that a form of it may have, numbers as {layer} and {expert}.
    dataset, loss: what it learns from and by, where the run names none; None: megalith has none, the run must name one.
    tokenizer_type: the tokenizer that a vocabulary file alone means.
    batch: (RunConfig, step) -> a made-up global batch, for checks of layouts (testing/batches.py).
    flops: as planner/flops.py: one_stack.
    layer_costs: as config/stages.py: two_stacks, where layers cost differently; None: all cost the same.
    causal: whether a token sees those before it alone.
    decoder: whether a second stack of layers, with cross attention to the first one's output, follows it.
    retrieval: whether some layers attend to neighbours that are retrieved for the text.
    head_transform: whether a dense layer with its own activation comes before the output layer.
    names: format -> its table of names there: huggingface (checkpoint/formats/huggingface/family.py: Family; absent:
        one of FAMILIES), megatron (checkpoint/formats/megatron/names.py: Table).
    checks: RunConfig -> problems that this model alone can have.
    activations: RunConfig -> {tensor: bytes} that embedding and head keep (planner/activations.py); None: not known.
    head_of: the model that this one is a head on, or adds to: it begins with that one's weights.
    head: the modules that it adds, as patterns of names.
    rank_parameters: (RunConfig, process) -> parameters as Megatron counts them; None: not counted.
    """

    name: str
    model: str
    plan: str
    stages: str
    shapes: str
    kinds: str
    dataset: str | None = "gpt"
    loss: str | None = "lm"
    tokenizer_type: str = "GPT2BPETokenizer"
    batch: str = "megalith.testing.batches:gpt"
    flops: str = "megalith.planner.flops:one_stack"
    layer_costs: str | None = None
    causal: bool = True
    decoder: bool = False
    retrieval: bool = False
    head_transform: bool = False
    head_of: str | None = None
    head: tuple[str, ...] = ()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    checks: str | None = None
    activations: str | None = None
    rank_parameters: str | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """Fields of the section `data` that follow from the model where nothing sets them."""
        return {name: value for name, value in (("dataset", self.dataset), ("loss", self.loss)) if value is not None}

    def find(self, part: str) -> Any:
        """What the address in field `part` names. Raises ConfigError where it cannot be imported."""
        return load(f"{part} of the model {self.name}", getattr(self, part))


GPT = Architecture(
    name="gpt",
    model="megalith.models.gpt:GPT",
    plan="megalith.parallel.plans.gpt:PLAN",
    stages="megalith.parallel.plans.gpt:STAGES",
    shapes="megalith.config.parameters:gpt_shapes",
    kinds="megalith.config.parameter_kinds:GPT",
    names={"megatron": "megalith.checkpoint.formats.megatron.names:GPT"},
    checks="megalith.config.checks.architectures:gpt_problems",
    activations="megalith.planner.activations:end_terms",
    rank_parameters="megalith.config.megatron.counts:rank_parameters",
)
BERT = Architecture(
    name="bert",
    model="megalith.models.bert:BERT",
    plan="megalith.parallel.plans.bert:PLAN",
    stages="megalith.parallel.plans.bert:STAGES",
    shapes="megalith.config.parameters:bert_shapes",
    kinds="megalith.config.parameter_kinds:BERT",
    dataset="bert",
    loss="bert",
    tokenizer_type="BertWordPieceLowerCase",
    batch="megalith.testing.batches:bert",
    causal=False,
    head_transform=True,
    names={"megatron": "megalith.checkpoint.formats.megatron.names:BERT"},
    checks="megalith.config.checks.architectures:bert_problems",
)
T5 = Architecture(
    name="t5",
    model="megalith.models.t5:T5",
    plan="megalith.parallel.plans.t5:PLAN",
    stages="megalith.parallel.plans.t5:STAGES",
    shapes="megalith.config.parameters:t5_shapes",
    kinds="megalith.config.parameter_kinds:T5",
    dataset="t5",
    loss="t5",
    tokenizer_type="BertWordPieceLowerCase",
    batch="megalith.testing.batches:t5",
    flops="megalith.planner.flops:all_layers",
    layer_costs="megalith.config.stages:two_stacks",
    decoder=True,
    names={"megatron": "megalith.checkpoint.formats.megatron.names:T5"},
    checks="megalith.config.checks.architectures:t5_problems",
)
RETRO = dataclasses.replace(
    GPT,
    name="retro",
    model="megalith.models.retro:Retro",
    plan="megalith.parallel.plans.retro:PLAN",
    stages="megalith.parallel.plans.retro:STAGES",
    shapes="megalith.config.parameters:retro_shapes",
    kinds="megalith.config.parameter_kinds:RETRO",
    dataset="retro",
    batch="megalith.testing.batches:retro",
    flops="megalith.planner.flops:all_layers",
    layer_costs="megalith.config.stages:with_neighbors",
    retrieval=True,
    head_of="gpt",
    head=("layers.*.cross_norm", "layers.*.cross_attention", "layers.*.encoder"),
    names={},
    checks="megalith.config.checks.retro:retro_problems",
    activations=None,
    rank_parameters=None,
)
BERT_CLASSIFICATION = dataclasses.replace(
    BERT,
    name="bert_classification",
    model="megalith.models.bert_classification:BertClassification",
    plan="megalith.parallel.plans.bert_classification:PLAN",
    stages="megalith.parallel.plans.bert_classification:STAGES",
    shapes="megalith.config.parameters:bert_classification_shapes",
    kinds="megalith.config.parameter_kinds:BERT_CLASSIFIER",
    dataset="classification",
    loss="classification",
    batch="megalith.testing.batches:classification",
    head_transform=False,
    head_of="bert",
    head=("classifier",),
    names={"megatron": "megalith.checkpoint.formats.megatron.names:BERT_CLASSIFICATION"},
    checks="megalith.config.checks.architectures:classification_problems",
)
BERT_MULTIPLE_CHOICE = dataclasses.replace(
    BERT_CLASSIFICATION,
    name="bert_multiple_choice",
    model="megalith.models.bert_multiple_choice:BertMultipleChoice",
    shapes="megalith.config.parameters:bert_multiple_choice_shapes",
    batch="megalith.testing.batches:multiple_choice",
    names={"megatron": "megalith.checkpoint.formats.megatron.names:BERT_MULTIPLE_CHOICE"},
    checks="megalith.config.checks.architectures:multiple_choice_problems",
)
ICT = dataclasses.replace(
    BERT,
    name="ict",
    model="megalith.models.biencoder:BiEncoder",
    plan="megalith.parallel.plans.biencoder:PLAN",
    stages="megalith.parallel.plans.biencoder:STAGES",
    shapes="megalith.config.parameters:biencoder_shapes",
    kinds="megalith.config.parameter_kinds:BIENCODER",
    dataset="ict",
    loss="ict",
    batch="megalith.testing.batches:ict",
    flops="megalith.planner.flops:two_towers",
    head_transform=False,
    names={"megatron": "megalith.checkpoint.formats.megatron.names:BIENCODER"},
    checks="megalith.config.checks.architectures:ict_problems",
)
ARCHITECTURES = Registry("model", {name.lower(): f"{__name__}:{name}" for name in (
    "GPT", "BERT", "T5", "RETRO", "BERT_CLASSIFICATION", "BERT_MULTIPLE_CHOICE", "ICT",
)})  # fmt: skip


def architecture(name: str) -> Architecture:
    """The record called `name`: a short name, or the module:name of a record, or of a class that carries one.

    Such a class is the model, whatever its record says, so that a class can carry another model's record with few
    changes. Raises ConfigError where there is none.
    """
    found = ARCHITECTURES.find(name)
    if isinstance(found, Architecture):
        return found
    record = getattr(found, "architecture", None)
    if not isinstance(record, Architecture):
        rule = "must be an Architecture (config/architectures.py), or a class that carries one as `architecture`"
        cure = "Give the class such an attribute; CONTRIBUTING.md shows a complete one"
        raise ConfigError(problem("The model", name, rule, cure))
    return dataclasses.replace(record, model=name)
