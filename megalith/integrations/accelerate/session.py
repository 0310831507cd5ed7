"""What `Accelerator.prepare` has built, and the gradients of the present optimizer step."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import GradientState
from torch import Tensor, nn

from megalith.common.errors import TrainingError
from megalith.config.run import RunConfig
from megalith.optim.clip import clip
from megalith.optim.loss_scale import StaticLossScale
from megalith.runtime.build import Runtime
from megalith.training.tasks import Task

if TYPE_CHECKING:
    from megalith.integrations.accelerate.optimizer import MegatronOptimizer
    from megalith.integrations.accelerate.plugin import MegatronLMPlugin


@dataclasses.dataclass
class Session:
    """A model on its devices, its task and its optimizer, which the objects that `prepare` returns have in common.

    task: its losses. kind: gpt, bert, bert_classification or t5 (parsers.py: kind_of). hf_config, hf_class: of the
    transformers model that it was made from; generation_config is that model's, if it has one. tokenizer_folder: where
    that model's tokenizer is, if known.
    steps: optimizer steps done; it keys the dropout masks. consumed_samples: of training calls, over all data-parallel
    processes. run: a name for the run, by which it knows its own checkpoints; that of process 0 counts.
    """

    plugin: MegatronLMPlugin
    config: RunConfig
    runtime: Runtime
    task: Task
    kind: str
    hf_config: Any
    hf_class: type
    loss_scale: StaticLossScale
    gradient_state: GradientState
    generation_config: Any | None = None
    tokenizer_folder: pathlib.Path | None = None
    optimizer: MegatronOptimizer | None = None
    trains: bool = True  # whether any parameter is trained, of all processes
    steps: int = 0
    consumed_samples: int = 0
    has_gradients: bool = False  # whether a backward pass of this step has added any; the same on every process
    run: str = dataclasses.field(default_factory=lambda: os.urandom(8).hex())
    # The norm of the complete gradients; None where they are not complete, or there are none.
    norm: Tensor | None = None
    clipped: bool = False  # by the script, in this step
    train_step: Any = None  # of the user's own, once it is made (steps/run.py: step_of)
    local: bool = False  # whether gradients have been added that are not summed over data-parallel replicas

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of this process."""
        return [parameter for _, parameter in self.runtime.named_parameters()]

    def reshard(self) -> None:
        """Let fully_shard register the parameters that it trains, and not what it has gathered for a pass."""
        for stage in self.runtime.stages:
            stage.reshard()

    def add_gradients(self, *, local: bool) -> None:
        """Note that a backward pass is about to add gradients. local: of this data-parallel replica alone.

        Raises TrainingError where those of the step have been completed.
        """
        if self.norm is not None:
            raise TrainingError(
                "A backward pass after clip_grad_norm_ or its like, which completed the gradients of this step, would "
                "mix two steps. Call optimizer.step() and optimizer.zero_grad() before it, or clip after the last "
                "backward pass."
            )
        self.local, self.has_gradients = self.local or local, True

    def finish_gradients(self, max_norm: float = 0.0) -> Tensor:
        """Complete the gradients of this step, once: of the global batch, without the loss scale, on every process.

        Every process calls it. max_norm: they are clipped to it; 0 leaves them. Returns their norm before, which is not
        finite where one of them is not.
        """
        if self.norm is None:
            self.reshard()
            self.runtime.finish_gradients(sum_replicas=self.local)
            self.norm = self._clip(max_norm, self.loss_scale.inverse)
        return self.norm

    def clip(self, max_norm: float) -> Tensor:
        """Complete the gradients, and scale them so that their norm is at most max_norm. Returns the norm before."""
        complete, self.clipped = self.norm is not None, True
        return self._clip(max_norm, 1.0) if complete else self.finish_gradients(max_norm)

    def _clip(self, max_norm: float, inverse_scale: float) -> Tensor:
        gradients, not_owned = self.runtime.gradients()
        stages = self.runtime.mesh.size("pp")
        return clip(
            gradients, max_norm, inverse_scale=inverse_scale, not_owned=not_owned, stages=stages,
            device=self.runtime.mesh.device,
        )  # fmt: skip

    def gradients_finite(self) -> bool:
        """Whether all gradients of this step are finite; waits for the device."""
        return bool(torch.isfinite(self.finish_gradients()))

    def discard_gradients(self) -> None:
        """Forget the gradients of this step."""
        self.reshard()
        for stage in self.runtime.stages:
            stage.discard_gradients()
        for parameter in self.parameters:
            parameter.grad = None
        self.norm, self.clipped, self.local, self.has_gradients = None, False, False, False
