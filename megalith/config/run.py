"""RunConfig: the tree of all sections, and the numbers derived from several of them."""

from __future__ import annotations

import dataclasses

from megalith.config.sections.batch import BatchConfig
from megalith.config.sections.checkpoint import CheckpointConfig
from megalith.config.sections.data import DataConfig
from megalith.config.sections.finetune import FinetuneConfig
from megalith.config.sections.logging import LoggingConfig
from megalith.config.sections.lora import LoraConfig
from megalith.config.sections.model import ModelConfig
from megalith.config.sections.optimizer import OptimizerConfig
from megalith.config.sections.parallel import ParallelConfig
from megalith.config.sections.precision import PrecisionConfig
from megalith.config.sections.recompute import RecomputeConfig
from megalith.config.sections.resilience import ResilienceConfig
from megalith.config.sections.retriever import RetrieverConfig
from megalith.config.sections.schedule import ScheduleConfig
from megalith.config.sections.validation import ValidationConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A complete run. Field names are unique over all sections, so that flags can be flat."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = dataclasses.field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    resilience: ResilienceConfig = dataclasses.field(default_factory=ResilienceConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    finetuning: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    retriever: RetrieverConfig = dataclasses.field(default_factory=RetrieverConfig)

    @property
    def run_folder(self) -> str:
        """Folder of the run's record (config, metrics, pictures): --run-dir, else that of --save, else runs/<name>."""
        return self.logging.run_dir or self.checkpoint.save or f"runs/{self.logging.name}"

    def replace(self, **values) -> RunConfig:
        """A copy with fields changed by their flat names: config.replace(num_layers=2, lr=1e-3)."""
        sections = {}
        for part in dataclasses.fields(self):
            current = getattr(self, part.name)
            names = [field.name for field in dataclasses.fields(current) if field.name in values]
            if names:
                sections[part.name] = dataclasses.replace(current, **{name: values.pop(name) for name in names})
        if values:
            raise TypeError(f"RunConfig has no field {', '.join(sorted(values))}")
        return dataclasses.replace(self, **sections)

    def flat(self) -> dict:
        """Every field by its flat name."""
        return {name: value for part in dataclasses.asdict(self).values() for name, value in part.items()}
