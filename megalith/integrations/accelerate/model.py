"""The model that `Accelerator.prepare` returns: called as the transformers model that it was made from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.integrations.accelerate import batches, generate
from megalith.integrations.accelerate.calls import call
from megalith.integrations.accelerate.saving import export
from megalith.integrations.accelerate.session import Session
from megalith.integrations.accelerate.steps import run as step_run


class MegatronModel(nn.Module):
    """A transformers model in a parallel layout.

    `model(**batch)` takes a transformers batch of this data-parallel process's samples and returns what the
    transformers model returns; every process calls it. With labels the loss is the mean over the unmasked tokens of all
    data-parallel processes, the same everywhere. config: the transformers model's.
    """

    def __init__(self, session: Session):
        super().__init__()
        self.session = session
        self.config = session.hf_config

    def forward(self, *inputs: Tensor, **batch: Any) -> Any:
        """The output of the transformers class, with the loss where the batch has labels.

        Logits are there where there are no labels, for classifiers, and with MegatronLMPlugin(return_logits=True).
        Raises ConfigError for an empty batch, or arguments that the model does not have.
        """
        session, return_dict = self.session, batch.pop("return_dict", None)
        if len(inputs) > 1:
            rule = "must be given by name, but for input_ids: transformers' classes order them differently"
            cure = "Write model(input_ids, attention_mask=...), or model(**batch)"
            raise ConfigError(problem("model(...)", Words(f"{len(inputs)} arguments without a name"), rule, cure))
        batch |= dict(zip(("input_ids",), inputs))
        if not batch:
            cure = "Iterate over the prepared loader, which is there on every process: `batch = next(loader)`"
            raise ConfigError(problem("model(**batch)", Words("an empty batch"), "must have samples", cure))
        if (step := step_run.step_of(session)) is not None:
            samples = self._sample_numbers(batch, step_run.rows_of(batch))
            return step_run.call(session, step, batch, samples, training=self.training)
        given = batch if "loss_mask" in batch else batches.to_batch(session.kind, batch, session)  # indexed: as it is
        given["samples"] = self._sample_numbers(given, len(given["input_ids"]))
        labelled = "labels" in given or "sentence_order" in given
        logits = session.plugin.return_logits or session.kind == "bert_classification"
        parts = batches.split(given, session.plugin.num_micro_batches, session.config)
        result = call(session, parts, labelled=labelled, logits=logits, training=self.training)
        found = None if result.logits is None else batches.cut(result.logits, given)
        return batches.outputs(session, result.loss, found, return_dict)

    def _sample_numbers(self, batch: Mapping[str, Tensor], rows: int) -> Tensor:
        """Global numbers of this process's samples, by which dropout masks are made; training calls count them.

        Those of an indexed dataset come with the batch.
        """
        session, mesh = self.session, self.session.runtime.mesh
        first = session.consumed_samples + mesh.data_rank * rows
        if self.training and torch.is_grad_enabled():
            session.consumed_samples += mesh.data_size * rows
        return batch["samples"] if "samples" in batch else torch.arange(first, first + rows)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator:
        """This process's parameters under their names in the whole megalith model."""
        for name, parameter in self.session.runtime.named_parameters():
            yield f"{prefix}.{name}" if prefix else name, parameter

    def train(self, mode: bool = True) -> MegatronModel:
        """Training or evaluation mode."""
        self.training = mode
        self.session.runtime.train(mode)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this step."""
        self.session.discard_gradients()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of calls within are summed over data-parallel processes later (Accelerator.no_sync)."""
        state = self.session.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(before)

    def state_dict(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        """Raises ConfigError: no process has all of it."""
        cure = "Use accelerator.get_state_dict(model), accelerator.save_state(folder) or model.save_pretrained(folder)"
        raise ConfigError(problem("model.state_dict()", Words("a sharded model"), "needs a whole model", cure))

    def save_pretrained(self, save_directory: str | os.PathLike, **options: Any) -> None:
        """Write a Hugging Face folder; every process calls it. See export.save_pretrained."""
        export.save_pretrained(self.session, save_directory, **options)

    def megatron_generate(self, inputs: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Prompts with generated text [b, n]; every process calls it. See generate.megatron_generate."""
        return generate.megatron_generate(self.session, inputs, attention_mask, **options)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Raises ConfigError: recomputation is chosen before the model is placed."""
        cure = "Call it before accelerator.prepare, or give MegatronLMPlugin(recompute_granularity='full')"
        raise ConfigError(problem("gradient_checkpointing_enable", Words("a prepared model"), "comes too late", cure))
