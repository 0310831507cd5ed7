"""Steps of a toy model, by transformers and by a Session's optimizer, that should end in the same weights."""

import types
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from megalith.integrations.accelerate.optimizer import MegatronOptimizer, adopt
from megalith.integrations.accelerate.session import Session
from megalith.optim.loss_scale import StaticLossScale
from megalith.runtime.build import Runtime, build_runtime, init_mesh
from megalith.runtime.load import weights_of
from megalith.testing.parity import full_tensor
from megalith.training.forward_backward import global_counts, run_micro_batches
from megalith.training.tasks import TASKS

ROWS, LENGTH = 4, 16
MakeOptimizer = Callable[[PreTrainedModel], Optimizer]
LOSSES = {"gpt2": "lm", "llama": "lm", "bert": "bert", "megatron-bert": "bert", "t5": "t5"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> processes, fields of RunConfig
    "one": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "dp2 sharded": (2, {"use_distributed_optimizer": True}),
    "zbv": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv"}),
    "tp2 pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}


def no_decay_groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Groups as scripts make them: no weight decay of biases and norms."""
    named = list(model.named_parameters())
    plain = [name.endswith("bias") or parameter.dim() == 1 for name, parameter in named]
    return [
        {"params": [each for (_, each), is_plain in zip(named, plain) if not is_plain], "weight_decay": 0.1},
        {"params": [each for (_, each), is_plain in zip(named, plain) if is_plain], "weight_decay": 0.0},
    ]


def batch_of(kind: str, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A random batch as transformers takes it, and as megalith does."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(4, 96, (ROWS, LENGTH), generator=draw)
    ones, samples = torch.ones(ROWS, LENGTH), {"samples": torch.arange(ROWS)}
    if LOSSES[kind] == "lm":
        shifted = {"labels": ids.roll(-1, 1), "loss_mask": ones.index_fill(1, torch.tensor([LENGTH - 1]), 0.0)}
        return {"input_ids": ids, "labels": ids}, {"input_ids": ids, **shifted, **samples}
    targets = torch.randint(4, 96, (ROWS, LENGTH), generator=draw)
    if kind == "t5":
        decoder = torch.cat((torch.zeros(ROWS, 1, dtype=torch.int64), targets[:, :-1]), dim=1)
        ours = {"decoder_input_ids": decoder, "labels": targets, "loss_mask": ones, "padding_mask": ones.long()}
        return {"input_ids": ids, "labels": targets}, {"input_ids": ids, **ours, **samples}
    masked, types_, order = torch.rand(ROWS, LENGTH, generator=draw) < 0.3, (ids > 50).long(), ids[:, 0] % 2
    theirs = {"labels": targets.masked_fill(~masked, -100), "token_type_ids": types_, "next_sentence_label": order}
    ours = {
        "labels": targets.masked_fill(~masked, -1), "loss_mask": masked.float(), "token_types": types_,
        "sentence_order": order, "padding_mask": ones.long(),
    }  # fmt: skip
    return {"input_ids": ids, **theirs}, {"input_ids": ids, **ours, **samples}


def placed(model: PreTrainedModel, *, keep_weights: bool = True, **fields: Any) -> Runtime:
    """The model with its weights in a layout, fields of RunConfig."""
    source = weights_of(model)
    config = source.config.replace(
        **{"seq_length": LENGTH, "micro_batch_size": ROWS, "global_batch_size": ROWS, "device": "cpu", **fields}
    )
    return build_runtime(config, init_mesh(config.parallel), weights=source if keep_weights else None)


def session_of(runtime: Runtime, kind: str = "gpt2", **plugin: Any) -> Session:
    """What `prepare` would make of it. plugin: fields of MegatronLMPlugin."""
    fields = {"gradient_clipping": 0.0, "no_wd_decay_cond": None, "scale_lr_cond": None, "lr_mult": 1.0, **plugin}
    task = TASKS.find(LOSSES[kind])()
    task.setup(runtime.config, runtime.mesh, None)
    return Session(
        plugin=types.SimpleNamespace(**fields), config=runtime.config, runtime=runtime, task=task, kind=kind,
        hf_config=None, hf_class=object, loss_scale=StaticLossScale(), gradient_state=GradientState(),
    )  # fmt: skip


def prepared(
    model: PreTrainedModel, optimizer: Optimizer, kind: str = "gpt2", layout: str = "one", **plugin: Any
) -> MegatronOptimizer:  # fmt: skip
    """The optimizer of the placed model."""
    Accelerator(cpu=True)  # whose state the wrappers of Accelerate want
    session = session_of(placed(model, **LAYOUTS[layout][1]), kind, **plugin)
    adopt(optimizer, model, session.runtime, session.plugin)
    session.optimizer = MegatronOptimizer(optimizer, session)
    return session.optimizer


def backward(session: Session, kind: str, number: int) -> None:
    """The gradients of this data-parallel rank's rows of batch `number`, in two micro-batches."""
    runtime, task = session.runtime, session.task
    rows = ROWS // runtime.mesh.data_size
    first = runtime.mesh.data_rank * rows
    halves = [{}, {}]
    for name, tensor in batch_of(kind, number)[1].items():
        for half, part in zip(halves, tensor[first : first + rows].chunk(2)):
            half[name] = part
    batches = [runtime.prepare_batch(half, task.sequences) for half in halves]
    session.add_gradients(local=True)
    counts = global_counts(runtime, task, batches)
    run_micro_batches(runtime, task, batches, counts, session.steps, train=True)


def trained(optimizer: MegatronOptimizer, kind: str, steps: range) -> dict[str, Tensor]:
    """This process's parameters, whole, after these steps."""
    for number in steps:
        backward(optimizer.session, kind, number)
        optimizer.step()
        optimizer.zero_grad()
    return {name: full_tensor(each) for name, each in optimizer.session.runtime.named_parameters()}


def trained_by_transformers(
    model: PreTrainedModel, optimizer: Optimizer, kind: str, steps: range, max_norm: float = 0.0
) -> dict[str, Tensor]:  # fmt: skip
    """The same by transformers, under megalith's names."""
    model.train()
    for number in steps:
        model(**batch_of(kind, number)[0]).loss.backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    tensors = weights_of(model).tensors
    return {name.removeprefix("model/"): lazy.read().detach().clone() for name, lazy in tensors.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """All of `found` are as expected, but for biases of keys: their gradients are rounding, of which Adam makes steps.

    (A softmax does not change when all keys do.)
    """
    for name, tensor in found.items():
        if not name.endswith("k.bias"):
            error = (tensor - expected[name]).abs().max()
            assert error <= tolerance, f"{name} differs by {error:.2g}"
