"""A stage of the model as one process holds it, with what sums its gradients; all of the model where there is no pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from torch import nn
from torch.distributed.fsdp import FSDPModule

from megalith.config.sections.parallel import ParallelConfig
from megalith.config.sections.precision import PrecisionConfig
from megalith.parallel import data_parallel
from megalith.parallel.sharding import sum_gradients


@dataclasses.dataclass(frozen=True)
class Part:
    """A stage. `names`: names of parameters here to those of the whole model, which checkpoints and initial weights go by."""

    model: nn.Module
    stage: int
    names: Mapping[str, str]
    wrapped: bool  # whether fully_shard holds it
    replicas: data_parallel.Replicas | None
    parallel: ParallelConfig
    precision: PrecisionConfig

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their names in the whole model."""
        for name, parameter in self.model.named_parameters():
            yield self.names.get(name, name), parameter

    def sync_gradients(self, last: bool) -> None:
        """Announce whether the coming backward pass is the last of the step, so that it sums the gradients of processes."""
        if self.wrapped:
            data_parallel.sync_gradients(self.model, last, self.parallel, self.precision)
        if self.replicas is not None:
            self.replicas.arm(last)

    def hold_gradients(self) -> None:
        """Announce a backward pass whose weight gradients come later, so that it must sum nothing, under fp16 neither."""
        self.sync_gradients(last=False)
        if self.wrapped:
            self.model.set_requires_gradient_sync(False)

    def after_late_gradients(self) -> None:
        """After gradients that came later than the backward pass."""
        if self.wrapped:
            data_parallel.widen_gradients(self.model)

    def reshard(self) -> None:
        """Let go of gathered parameters, which evaluation under ZeRO-2 leaves in the place of the shards."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def finish_gradients(self) -> None:
        """After the last backward pass: the gradients of this part are those of the global batch."""
        if self.replicas is not None:
            self.replicas.finish()
        sum_gradients(self.model)
