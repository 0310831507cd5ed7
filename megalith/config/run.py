"""RunConfig: the tree of all sections, and the numbers derived from several of them."""

from __future__ import annotations

import dataclasses

from megalith.config.batch import BatchConfig
from megalith.config.checkpoint import CheckpointConfig
from megalith.config.data import DataConfig
from megalith.config.logging import LoggingConfig
from megalith.config.model import ModelConfig
from megalith.config.optimizer import OptimizerConfig
from megalith.config.parallel import ParallelConfig
from megalith.config.precision import PrecisionConfig
from megalith.config.recompute import RecomputeConfig
from megalith.config.resilience import ResilienceConfig
from megalith.config.schedule import ScheduleConfig
from megalith.config.validation import ValidationConfig


def _of(kind: type):
    return dataclasses.field(default_factory=kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, whole. Field names are unique over all sections, so that flags can be flat."""

    model: ModelConfig = _of(ModelConfig)
    parallel: ParallelConfig = _of(ParallelConfig)
    data: DataConfig = _of(DataConfig)
    batch: BatchConfig = _of(BatchConfig)
    optimizer: OptimizerConfig = _of(OptimizerConfig)
    schedule: ScheduleConfig = _of(ScheduleConfig)
    precision: PrecisionConfig = _of(PrecisionConfig)
    recompute: RecomputeConfig = _of(RecomputeConfig)
    checkpoint: CheckpointConfig = _of(CheckpointConfig)
    validation: ValidationConfig = _of(ValidationConfig)
    logging: LoggingConfig = _of(LoggingConfig)
    resilience: ResilienceConfig = _of(ResilienceConfig)

    def replace(self, **values) -> RunConfig:
        """A copy with fields changed by their flat names: config.replace(num_layers=2, lr=1e-3)."""
        sections = {}
        for part in dataclasses.fields(self):
            current = getattr(self, part.name)
            mine = {field.name: values.pop(field.name) for field in dataclasses.fields(current) if field.name in values}
            if mine:
                sections[part.name] = dataclasses.replace(current, **mine)
        if values:
            raise TypeError(f"RunConfig has no field {', '.join(sorted(values))}")
        return dataclasses.replace(self, **sections)

    def flat(self) -> dict:
        """Every field by its flat name."""
        return {name: value for part in dataclasses.asdict(self).values() for name, value in part.items()}
