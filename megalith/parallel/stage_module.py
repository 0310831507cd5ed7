"""A pipeline stage of the model on one process, and the sums of its gradients; the whole model without a pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from megalith.config.sections.parallel import ParallelConfig
from megalith.config.sections.precision import PrecisionConfig
from megalith.parallel import data_parallel
from megalith.parallel.sharding import sum_partial_gradients


@dataclasses.dataclass(frozen=True)
class StageModule:
    """A pipeline stage on one process: its module `model`, and how its gradients are summed over the other axes.

    stage_index: number of the stage in the whole pipeline, from 0.
    names: from the names of this stage's parameters to those in the whole model, which checkpoints and initial weights
        use.
    wrapped: whether fully_shard has been applied to `model`.
    replicas: sums the gradients where it has not; None without data and context parallelism.
    """

    model: nn.Module
    stage_index: int
    names: Mapping[str, str]
    wrapped: bool
    replicas: data_parallel.Replicas | None
    parallel: ParallelConfig
    precision: PrecisionConfig

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their names in the whole model."""
        for name, parameter in self.model.named_parameters():
            yield self.names.get(name, name), parameter

    def set_gradient_sync(self, last: bool) -> None:
        """Announce whether the next backward pass is the step's last, which sums gradients over dp and cp processes.

        Under fp16 with sharding each pass does (data_parallel.set_gradient_sync).
        """
        if self.wrapped:
            data_parallel.set_gradient_sync(self.model, last, self.parallel, self.precision)
        if self.replicas is not None:
            self.replicas.set_gradient_sync(last)

    def defer_gradient_sync(self) -> None:
        """Announce a backward pass whose weight gradients are deferred: it sums nothing, not even under fp16."""
        self.set_gradient_sync(last=False)
        if self.wrapped:
            self.model.set_requires_gradient_sync(False)

    def accumulate_deferred_gradients(self) -> None:
        """Add deferred gradients, which came after the backward pass, to the float32 sums of a wrapped model."""
        if self.wrapped:
            data_parallel.upcast_gradients(self.model)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of activations."""
        dtype = next(self.model.parameters()).dtype
        return getattr(torch, self.precision.compute_dtype) if self.wrapped and dtype == torch.float32 else dtype

    def reshard(self) -> None:
        """Free gathered parameters, which evaluation under ZeRO-2 leaves instead of the shards."""
        for module in self._fully_sharded():
            module.reshard()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Within the block every process has whole parameters, in the compute format.

        A forward pass then has no collectives over data-parallel processes: each may make as many as it likes.
        """
        for module in self._fully_sharded():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in self._fully_sharded():
                module.set_reshard_after_forward(self.parallel.sharding == "full", recurse=False)
            self.reshard()

    def _fully_sharded(self) -> Iterator[FSDPModule]:
        return (module for module in self.model.modules() if isinstance(module, FSDPModule))

    def discard_gradients(self) -> None:
        """Forget gradients that fully_shard has accumulated and not reduced yet."""
        if self.wrapped:
            data_parallel.discard_unsharded_gradients(self.model)

    def finish_gradients(self, sum_replicas: bool = True) -> None:
        """After the last backward pass: complete the sums over the other axes (dp, cp, tp).

        The gradients are then those of the global batch, except for copies on other stages (pipeline/shared.py).
        sum_replicas: False where those of replicas are summed already.
        """
        if self.replicas is not None and sum_replicas:
            self.replicas.finish()
        sum_partial_gradients(self.model)
