"""Train steps of the user's own, as Megatron's training loop calls them: a batch, a forward step, a loss function.

    class WithMyLoss(GPTTrainStep):
        def get_loss_func(self):
            def loss_func(loss_mask, losses): ...      # -> loss, {"lm loss": averaged over data-parallel ranks}
            return loss_func

    accelerator.state.megatron_lm_plugin.custom_train_step_class = WithMyLoss

`forward_step(data_iterator, model)` returns the model's output and a function of it: the loss function with all other
arguments bound. It is called once for each micro-batch. How the steps are run: run.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers.modeling_outputs
from torch import Tensor

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.integrations.accelerate.batches import IGNORED, IndexedBatch, to_batch
from megalith.integrations.accelerate.collectives import avg_losses_across_data_parallel_group
from megalith.integrations.accelerate.steps.arguments import StepArguments
from megalith.integrations.accelerate.steps.megatron_models import visible_in
from megalith.training.tasks import Batch

LossFunction = Callable[..., tuple]


class AbstractTrainStep:
    """What `custom_train_step_class` derives from; the classes below do all of it, so that few methods are overridden.

    The methods may be written in either form that Accelerate has had: with the accelerator as their first argument, or
    without. name: of the step. model_output_class: of what a call of the model returns; None: the loss alone.
    """

    forward_step: Callable
    model_output_class: type | None

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def get_batch_func(self, accelerator: Any = None, megatron_dataset_flag: bool | None = None) -> Callable:
        """A function from an iterator over one micro-batch to the tensors that `forward_step` needs."""
        raise NotImplementedError(f"{type(self).__name__}.get_batch_func")

    def get_forward_step_func(self) -> Callable:
        """A function forward_step(data_iterator, model) -> (the model's output, a function of the output).

        That function returns (loss, {name: reported value}), or (sum of losses, number of tokens, reported values).
        """
        raise NotImplementedError(f"{type(self).__name__}.get_forward_step_func")

    def get_loss_func(self, accelerator: Any = None) -> LossFunction:
        """The loss function, whose last argument is the model's output."""
        raise NotImplementedError(f"{type(self).__name__}.get_loss_func")


class _TrainStep(AbstractTrainStep):
    """What the three steps have in common: get_batch, loss_func, forward_step and model_output_class, ready for use."""

    output_class = ""  # of transformers

    def __init__(self, accelerator: Any = None, args: StepArguments | None = None):
        """(args), or (accelerator, args): the two forms of Accelerate's."""
        super().__init__(type(self).__name__)
        self.args = args = accelerator if args is None else args
        accelerator = None if args is accelerator else accelerator
        self.get_batch = call_in_either_form(self.get_batch_func, accelerator, args.megatron_dataset_flag)
        self.loss_func = call_in_either_form(self.get_loss_func, accelerator, *self.loss_arguments)
        self.forward_step = self.get_forward_step_func(*self.forward_arguments)
        self.model_output_class = output_class_of(type(self), args)

    @property
    def loss_arguments(self) -> tuple:
        """What get_loss_func is called with, beside the accelerator."""
        return ()

    @property
    def forward_arguments(self) -> tuple:
        """What get_forward_step_func is called with."""
        return ()

    def next_batch(self, kind: str, data_iterator: Iterator) -> Batch:
        """The next micro-batch under megalith's names: that of an indexed dataset, or a translated one."""
        data = next(data_iterator)
        return data if isinstance(data, IndexedBatch) else to_batch(kind, data, self.args.session)


class GPTTrainStep(_TrainStep):
    """Next-token cross entropy, averaged over the unmasked tokens of a micro-batch."""

    output_class = "CausalLMOutputWithCrossAttentions"

    def __init__(self, accelerator: Any = None, args: StepArguments | None = None):
        """As _TrainStep. Has eod_token, pad_token, reset_position_ids, reset_attention_mask and eod_mask_loss too."""
        super().__init__(accelerator, args)
        self.eod_token = self.pad_token = self.args.eos_token_id
        self.reset_position_ids = self.args.reset_position_ids
        self.reset_attention_mask = self.args.reset_attention_mask
        self.eod_mask_loss = self.args.eod_mask_loss

    def get_batch_func(self, accelerator: Any = None, megatron_dataset_flag: bool | None = None) -> Callable:
        """tokens, labels (already shifted), loss_mask (float32), attention_mask, position_ids; all [b, s].

        attention_mask is None where only what is causal is hidden. With documents (--reset-attention-mask) it is
        Megatron's, bool [b, 1, s, s].
        """

        def get_batch(data_iterator: Iterator) -> tuple:
            batch = self.next_batch("gpt", ensure_labels(data_iterator))
            tokens, labels, mask = batch["input_ids"], batch["labels"], batch["loss_mask"].float()
            if self.eod_mask_loss and not isinstance(batch, IndexedBatch):  # whose dataset has done so
                mask = mask * (tokens != self.eod_token)
            hidden = batch.get("padding_mask")
            if "documents" in batch:
                hidden = ~visible_in(batch["documents"])[:, None]
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            return tokens, labels, mask, hidden, batch.get("positions", positions)

        return self.args.custom_get_batch_function or get_batch

    def get_loss_func(self, accelerator: Any = None) -> LossFunction:
        """loss_func(loss_mask, output_tensor); with return_logits the output is (losses, logits)."""

        def loss_func(loss_mask: Tensor, output_tensor: Any) -> tuple[Tensor, dict[str, Tensor]]:
            losses, logits = output_tensor if self.args.return_logits else (output_tensor, None)
            loss = masked_mean(losses, loss_mask)
            reported = {"lm loss": avg_losses_across_data_parallel_group([loss])[0]}
            return loss, reported if logits is None else reported | {"logits": logits}

        return self.args.custom_loss_function or loss_func

    def get_forward_step_func(self) -> Callable:
        """As Megatron's pretrain_gpt.py."""

        def forward_step(data_iterator: Iterator, model: Callable) -> tuple:
            tokens, labels, loss_mask, attention_mask, position_ids = self.get_batch(data_iterator)
            output_tensor = model(tokens, position_ids, attention_mask, labels=labels)
            return output_tensor, partial(self.loss_func, loss_mask)

        return forward_step


class BertTrainStep(_TrainStep):
    """BERT's losses, of masked tokens and of the order of two segments, or that of a classifier."""

    output_class = "SequenceClassifierOutput"

    @property
    def loss_arguments(self) -> tuple:
        return self.args.pretraining_flag, self.args.num_labels

    @property
    def forward_arguments(self) -> tuple:
        return self.args.pretraining_flag, self.args.bert_binary_head

    def get_batch_func(self, accelerator: Any = None, megatron_dataset_flag: bool | None = None) -> Callable:
        """tokens, types, sentence_order, loss_mask, labels, padding_mask; what the data lacks is None."""
        kind = "bert" if self.args.pretraining_flag else "bert_classification"

        def get_batch(data_iterator: Iterator) -> tuple:
            batch = self.next_batch(kind, data_iterator)
            if "positions" in batch:
                rule, cure = "cannot be passed on by Megatron's train step for BERT", "Take it out of the batch"
                raise ConfigError(problem("position_ids", Words("a tensor"), rule, cure))
            order, labels, mask = batch.get("sentence_order"), batch.get("labels"), batch.get("loss_mask")
            if "order_mask" in batch:
                order = order.masked_fill(batch["order_mask"] == 0, -1)
            if kind == "bert_classification" and mask is not None:
                labels = labels.masked_fill(mask == 0, IGNORED)
            return batch["input_ids"], batch.get("token_types"), order, mask, labels, batch.get("padding_mask")

        return self.args.custom_get_batch_function or get_batch

    def get_loss_func(
        self, accelerator: Any = None, pretraining_flag: bool | None = None, num_labels: int | None = None
    ) -> LossFunction:
        """loss_func(loss_mask, sentence_order, output_tensor) in pre-training, else loss_func(labels, logits)."""

        def loss_of_pretraining(
            loss_mask: Tensor, sentence_order: Tensor | None, output_tensor: tuple[Tensor, Tensor | None]
        ) -> tuple[Tensor, dict[str, Tensor]]:
            losses, order = output_tensor
            parts = {"lm loss": masked_mean(losses, loss_mask)}
            if order is not None and sentence_order is not None:
                parts["sop loss"] = F.cross_entropy(order.float(), sentence_order.view(-1), ignore_index=-1)
            averaged = avg_losses_across_data_parallel_group(list(parts.values()))
            return torch.stack(list(parts.values())).sum(), dict(zip(parts, averaged, strict=True))

        def loss_of_classes(labels: Tensor, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = F.cross_entropy(logits.float(), labels.view(-1))
            reported = {"loss": avg_losses_across_data_parallel_group([loss])[0]}
            return loss, reported | ({"logits": logits} if self.args.return_logits else {})

        own = loss_of_pretraining if self.args.pretraining_flag else loss_of_classes
        return self.args.custom_loss_function or own

    def get_forward_step_func(
        self, pretraining_flag: bool | None = None, bert_binary_head: bool | None = None
    ) -> Callable:
        """As Megatron's pretrain_bert.py."""

        def forward_step(data_iterator: Iterator, model: Callable) -> tuple:
            tokens, types, sentence_order, loss_mask, labels, padding_mask = self.get_batch(data_iterator)
            if not self.args.pretraining_flag:
                return model(tokens, padding_mask, tokentype_ids=types), partial(self.loss_func, labels)
            types = types if self.args.bert_binary_head else None
            output_tensor = model(tokens, padding_mask, tokentype_ids=types, lm_labels=labels)
            return output_tensor, partial(self.loss_func, loss_mask, sentence_order)

        return forward_step


class T5TrainStep(_TrainStep):
    """Cross entropy of the decoder's target, averaged over the unmasked tokens of a micro-batch."""

    output_class = "Seq2SeqLMOutput"

    @staticmethod
    def attn_mask_postprocess(attention_mask: Tensor) -> Tensor:
        """Megatron's mask bool [b, s, s], True where hidden, of an encoder's [b, s], 1 for tokens."""
        return ~(attention_mask.bool()[:, None] & attention_mask.bool()[..., None])

    @staticmethod
    def get_decoder_mask(seq_length: int, device: torch.device) -> Tensor:
        """Megatron's causal mask bool [1, t, t], True where hidden."""
        return torch.ones(1, seq_length, seq_length, dtype=torch.bool, device=device).triu(1)

    @staticmethod
    def get_enc_dec_mask(attention_mask: Tensor, dec_seq_length: int, device: torch.device) -> Tensor:
        """Megatron's mask bool [b, t, s] of cross attention, True where hidden, of an encoder's [b, s]."""
        return ~attention_mask.bool().to(device)[:, None].expand(-1, dec_seq_length, -1)

    def get_batch_func(self, accelerator: Any = None, megatron_dataset_flag: bool | None = None) -> Callable:
        """tokens_enc, tokens_dec, loss_mask, labels, enc_mask, dec_mask, enc_dec_mask.

        The masks are [b, s] or [b, t], not zero for tokens, or None: the forward step's model takes them as well as
        Megatron's [b, s, s].
        """

        def get_batch(data_iterator: Iterator) -> tuple:
            batch = self.next_batch("t5", data_iterator)
            tokens = batch["input_ids"], batch["decoder_input_ids"]
            padding, decoder_padding = batch.get("padding_mask"), batch.get("decoder_key_padding_mask")
            return *tokens, batch["loss_mask"].float(), batch["labels"], padding, decoder_padding, padding

        return self.args.custom_get_batch_function or get_batch

    def get_loss_func(self, accelerator: Any = None) -> LossFunction:
        """loss_func(loss_mask, output_tensor)."""

        def loss_func(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = masked_mean(output_tensor, loss_mask)
            return loss, {"lm loss": avg_losses_across_data_parallel_group([loss])[0]}

        return self.args.custom_loss_function or loss_func

    def get_forward_step_func(self) -> Callable:
        """As Megatron's pretrain_t5.py."""

        def forward_step(data_iterator: Iterator, model: Callable) -> tuple:
            tokens, decoder_tokens, loss_mask, labels, *masks = self.get_batch(data_iterator)
            output_tensor = model(tokens, decoder_tokens, *masks, tokentype_ids=None, lm_labels=labels)
            return output_tensor, partial(self.loss_func, loss_mask)

        return forward_step


TRAIN_STEPS = {
    "gpt": GPTTrainStep, "bert": BertTrainStep, "bert_classification": BertTrainStep, "t5": T5TrainStep,
}  # fmt: skip


def masked_mean(losses: Tensor, loss_mask: Tensor) -> Tensor:
    """The mean of losses [b, s] where loss_mask is 1; 0 where it is so nowhere, which leaves no gradient but no nan."""
    mask = loss_mask.view(-1).float()
    return torch.sum(losses.float().view(-1) * mask) / mask.sum().clamp(min=torch.finfo(torch.float32).tiny)


def ensure_labels(data_iterator: Iterator) -> Iterator:
    """The batches of transformers' kind with labels: the ids where they have none, as Megatron's language models do."""
    for data in data_iterator:
        if isinstance(data, IndexedBatch) or "labels" in data:
            yield data
        else:
            ids = data["input_ids"]
            padding = data.get("attention_mask", torch.ones_like(ids)) == 0
            yield {**data, "labels": ids.masked_fill(padding, IGNORED)}


def call_in_either_form(method: Callable, accelerator: Any, *arguments: Any) -> Any:
    """Call a method that may have been written for either form of Accelerate's, with the accelerator or without."""
    try:
        inspect.signature(method).bind(accelerator, *arguments)
    except TypeError:
        return method(*arguments)
    return method(accelerator, *arguments)


def build_train_step(kind: str, args: StepArguments) -> AbstractTrainStep:
    """The user's train step: custom_train_step_class, made with `args` and custom_train_step_kwargs.

    Without a class it is the step of the kind (gpt, bert, bert_classification or t5), which takes custom_loss_function
    and custom_get_batch_function. Raises ConfigError where the class cannot be a step, and for context parallelism.
    """
    step_class, arguments = args.custom_train_step_class, dict(args.custom_train_step_kwargs or {})
    if args.context_parallel_size > 1:
        rule = "must be 1 with a train step of your own, whose loss function needs whole sequences"
        cure = "Use tensor or pipeline parallelism"
        raise ConfigError(problem("context_parallel_size", args.context_parallel_size, rule, cure))
    if step_class is None:
        return TRAIN_STEPS[kind](args)
    if not callable(step_class):
        rule, cure = "must be a class derived from AbstractTrainStep", "Derive it from GPTTrainStep or its like"
        raise ConfigError(problem("custom_train_step_class", step_class, rule, cure))
    step = step_class(args, **arguments)
    if not isinstance(step, AbstractTrainStep) and not hasattr(step, "forward_step"):
        rule, cure = "must have forward_step(data_iterator, model)", "Derive it from GPTTrainStep or its like"
        raise ConfigError(problem("custom_train_step_class", Words(f"{step_class.__name__}"), rule, cure))
    if not hasattr(step, "forward_step"):
        step.forward_step = step.get_forward_step_func()
    if not hasattr(step, "model_output_class"):
        step.model_output_class = output_class_of(TRAIN_STEPS[kind], args)
    return step


def output_class_of(step_class: type[_TrainStep], args: StepArguments) -> type | None:
    """The class of transformers in which a call returns its loss; None: the loss alone, as the model's config asks."""
    return getattr(transformers.modeling_outputs, step_class.output_class) if args.model_return_dict else None
