"""Sessions with a train step of the user's own, without an Accelerator, and transformers' numbers beside them."""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate.state import GradientState
from torch import Tensor

from megalith.integrations.accelerate.collectives import avg_losses_across_data_parallel_group, set_mesh
from megalith.integrations.accelerate.plugin import MegatronLMPlugin
from megalith.integrations.accelerate.session import Session
from megalith.integrations.accelerate.steps.run import call, step_of
from megalith.integrations.accelerate.steps.train_steps import GPTTrainStep
from megalith.optim.loss_scale import build_loss_scale
from megalith.runtime.build import build_runtime, init_mesh
from megalith.runtime.load import weights_of
from megalith.training.tasks import TASKS
from tests.integrations.accelerate.helpers import accelerating, toy_model

KINDS = {"gpt2": "gpt", "llama": "gpt", "megatron-bert": "bert", "t5": "t5"}
LOSSES = {"gpt": "lm", "bert": "bert", "bert_classification": "classification", "t5": "t5"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tp_degree": 2, "sequence_parallelism": True}),
    "pp2": (2, {"pp_degree": 2}),
    "dp2 pp2": (4, {"pp_degree": 2, "use_distributed_optimizer": True}),
    "tp2 pp2": (4, {"tp_degree": 2, "pp_degree": 2, "sequence_parallelism": True}),
}
BATCH, LENGTH = 8, 16


def session_of(kind: str, head: str | None = None, return_dict: bool = True, **fields: Any) -> Session:
    """A session over the present processes. fields: of the plugin."""
    plugin, model = MegatronLMPlugin(**fields), toy_model(kind, head, return_dict=return_dict)
    source, layout = weights_of(model), plugin.run_fields()
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel",
             "use_distributed_optimizer", "context_parallel_size")  # fmt: skip
    config = source.config.replace(device="cpu", **{name: layout[name] for name in names})
    mesh = init_mesh(config.parallel)
    set_mesh(mesh)
    short = "bert_classification" if head == "classification" else KINDS[kind]
    task = TASKS.find(LOSSES[short])()
    task.setup(config, mesh, None)
    return Session(
        plugin=plugin, config=config, runtime=build_runtime(config, mesh, weights=source), task=task, kind=short,
        hf_config=model.config, hf_class=type(model), loss_scale=build_loss_scale(config.precision),
        gradient_state=GradientState(),
    )  # fmt: skip


def global_batch(kind: str, head: str | None = None) -> dict[str, Tensor]:
    """A batch of transformers' names for all data-parallel processes, some of it padded."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 96, (BATCH, LENGTH), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 11:] = mask[4, 14:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if head == "classification":
        return batch | {"labels": torch.randint(2, (BATCH,), generator=draw)}
    if kind == "megatron-bert":
        chosen = torch.rand(ids.shape, generator=draw) < 0.4
        batch["labels"] = batch["labels"].masked_fill(~chosen, -100)
        batch |= {"token_type_ids": (torch.arange(LENGTH) > 7).long().expand_as(ids).contiguous()}
        batch |= {"next_sentence_label": torch.randint(2, (BATCH,), generator=draw)}
    if kind == "t5":
        batch["labels"] = torch.randint(4, 96, (BATCH, 12), generator=draw)
        batch["labels"][2, 9:] = -100
    return batch


class Weighted(GPTTrainStep):
    """As the guide's: the loss of each sample, and samples with key tokens count for more."""

    def __init__(self, megatron_args, **kwargs):
        super().__init__(megatron_args)
        self.kwargs = kwargs

    def get_loss_func(self):
        def loss_func(inputs, loss_mask, output_tensor):
            loss = weighted(output_tensor, inputs, loss_mask, self.kwargs["token"])
            return loss, {"lm loss": avg_losses_across_data_parallel_group([loss])[0], "two": torch.tensor(2.0)}

        return loss_func

    def get_forward_step_func(self):
        from functools import partial

        def forward_step(data_iterator, model):
            tokens, labels, loss_mask, attention_mask, position_ids = self.get_batch(data_iterator)
            output_tensor = model(tokens, position_ids, attention_mask, labels=labels)
            return output_tensor, partial(self.loss_func, tokens, loss_mask)

        return forward_step


def weighted(losses: Tensor, ids: Tensor, mask: Tensor, token: int) -> Tensor:
    """The mean over samples of their mean losses, times 1 + the number of their ids up to `token`."""
    of_samples = (losses * mask).sum(dim=1) / mask.sum(dim=1)
    return (of_samples * (1.0 + (ids <= token).sum(dim=1))).mean()


def reference(kind: str, head: str | None, how: str) -> tuple[float, float]:
    """Loss and norm of the gradients of transformers' model on the global batch. how: own, weighted or tokens."""
    model, batch = toy_model(kind, head), global_batch(kind, head)
    model.train()
    if how == "own":
        loss = model(**batch).loss
    else:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        mask = (labels != -100).float()
        loss = weighted(losses, batch["input_ids"], mask, 20) if how == "weighted" else losses.sum() / mask.sum()
    loss.backward()
    norms = torch.stack([each.grad.norm() for each in model.parameters() if each.grad is not None])
    return loss.item(), norms.norm().item()


def local_batch(session: Session, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """This data-parallel process's samples, and their numbers."""
    rows = BATCH // session.runtime.mesh.data_size
    first = session.runtime.mesh.data_rank * rows
    return {name: each[first : first + rows] for name, each in batch.items()}, torch.arange(first, first + rows)


def stepped(kind: str, head: str | None, fields: dict[str, Any], factor: float = 1.0) -> dict[str, Any]:
    """One call with a train step, on one rank: loss, what was reported, norm of the gradients of loss * factor."""
    with accelerating():
        session = session_of(kind, head, **fields)
        session.runtime.train()
        batch, samples = local_batch(session, global_batch(kind, head))
        output = call(session, step_of(session), batch, samples, training=True)
        (output.loss * factor).backward()
        losses = {name: each.tolist() for name, each in output.losses.items()}
        logits = None if output.logits is None else list(output.logits.shape)
        norm = session.finish_gradients().item()
        session.runtime.train(False)
        with torch.no_grad():
            evaluated = call(session, step_of(session), batch, samples, training=False).loss.item()
        return {"loss": output.loss.item(), "losses": losses, "logits": logits, "norm": norm, "evaluated": evaluated}
