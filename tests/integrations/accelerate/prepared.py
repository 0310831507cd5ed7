"""A prepared model, and Accelerate's own Accelerator with it, made without `prepare`: for tests of one module alone."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import accelerate
import torch
import transformers
from accelerate.state import GradientState

from megalith.integrations.accelerate.session import Session
from megalith.optim.loss_scale import build_loss_scale
from megalith.runtime.build import build_runtime, init_mesh
from megalith.runtime.load import weights_of
from megalith.testing.parity import forward_backward_once, full_tensor
from megalith.training.tasks import build_task
from tests.integrations.accelerate.helpers import accelerating

SAMPLES = 8  # of a step
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # processes, fields of RunConfig
    "one": (1, {}),
    "dp2": (2, {}),
    "dp2 sharded": (2, {"use_distributed_optimizer": True}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "virtual": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "tp2 pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}),
    "dp2 pp2 sharded": (4, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}),
}


def processes(layout: str) -> int:
    """The number of processes of a layout."""
    return LAYOUTS[layout][0]


def prepare(
    model: transformers.PreTrainedModel, layout: str = "one", optimizer: str | type | None = "AdamW", **changes: Any
) -> Session:
    """The session that `Accelerator.prepare` makes of a model and an optimizer with two groups of parameters.

    changes: fields of RunConfig.
    """
    weights = weights_of(model)
    lengths = {"seq_length": 16} | ({"decoder_seq_length": 12} if weights.config.model.decoder_layers else {})
    batch = {"micro_batch_size": 2, "global_batch_size": SAMPLES, "device": "cpu"}
    config = weights.config.replace(**lengths, **batch, **LAYOUTS[layout][1], **changes)
    mesh = init_mesh(config.parallel)
    runtime = build_runtime(config, mesh, weights=weights)
    session = Session(
        plugin=types.SimpleNamespace(), config=config, runtime=runtime, task=build_task(config, mesh),
        kind=config.model.model_type,
        hf_config=model.config, hf_class=type(model), generation_config=getattr(model, "generation_config", None),
        loss_scale=build_loss_scale(config.precision), gradient_state=GradientState(),
    )  # fmt: skip
    if optimizer is not None:
        made = getattr(torch.optim, optimizer) if isinstance(optimizer, str) else optimizer
        momentum = {"momentum": 0.9} if optimizer in ("SGD", "RMSprop") else {}
        matrices = [parameter for parameter in session.parameters if parameter.dim() > 1]
        others = [parameter for parameter in session.parameters if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        session.optimizer = types.SimpleNamespace(optimizer=made(groups, lr=3e-3, **momentum))
    return session


def train(session: Session, steps: int, scheduler: Any = None) -> list[float]:
    """The losses of further steps; a step's batch is a function of its number."""
    losses = []
    for _ in range(steps):
        losses.append(forward_backward_once(session.runtime, session.steps))
        session.optimizer.optimizer.step()
        session.optimizer.optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        session.steps += 1
        session.consumed_samples += SAMPLES
    return losses


@contextlib.contextmanager
def accelerator_of(session_arguments: tuple[Any, ...], changes: dict | None = None, **options: Any) -> Iterator[Any]:
    """Accelerate's Accelerator with a session of `prepare`. options: of the Accelerator."""
    with accelerating():
        accelerator = accelerate.Accelerator(cpu=True, **options)
        accelerator.session = prepare(*session_arguments, **(changes or {}))
        yield accelerator


def whole_weights(session: Session) -> dict[str, torch.Tensor]:
    """This process's weights, each whole."""
    return {name: full_tensor(parameter) for name, parameter in session.runtime.named_parameters()}
