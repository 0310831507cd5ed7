"""The model as a train step calls it: with the arguments of Megatron's GPTModel, BertModel, Classification or T5Model.

    output_tensor = model(tokens, position_ids, attention_mask, labels=labels)       # GPT: losses [b, s]
    lm_loss, sop_logits = model(tokens, padding_mask, tokentype_ids=types, lm_labels=labels)          # BERT
    logits = model(tokens, padding_mask, tokentype_ids=types)                        # BERT that classifies
    output_tensor = model(tokens_enc, tokens_dec, enc_mask, dec_mask, enc_dec_mask, lm_labels=labels)   # T5

Losses are float32 with gradient, for any function; without labels there are logits [b, s, V] instead, of the whole
vocabulary at its true size. Masks are those of Megatron, where True hides ([b, 1, s, s], [b, s, s]), or a tokenizer's
[b, s], where 1 is a token; None hides nothing but what is causal.
Shapes: b samples, s tokens, t tokens of a decoder, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.common.errors import TrainingError, problem
from megalith.config.flags.text import Words
from megalith.runtime.build import Runtime
from megalith.training.tasks import Batch


class Call(NamedTuple):
    """One call of the model.

    arguments: those of megalith's model, by name. results: from its output to what Megatron's model returns.
    """

    arguments: Batch
    results: Callable[[Any], Any]


class StepModel:
    """What a train step gets as `model`, for one micro-batch: the model of the runtime, called as Megatron's is."""

    def __init__(self, runtime: Runtime, kind: str, return_logits: bool, samples: Tensor, step: Tensor, training: bool):
        """kind: gpt, bert, bert_classification or t5. return_logits: a GPT returns (losses, logits) where labels are.

        samples: [b], and step: [], key the dropout masks.
        """
        self.runtime, self.kind, self.return_logits, self.training = runtime, kind, return_logits, training
        self.call: Call | None = None  # that a RecordingModel has recorded
        self.keys: Batch = {"samples": samples, "step": step}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The losses, or the logits; see the module."""
        call = self.translated(*args, **kwargs)
        return call.results(self.runtime.model(**call.arguments))

    def translated(self, *args: Any, **kwargs: Any) -> Call:
        """The call in terms of megalith's model."""
        with_logits = {"return_logits": self.return_logits} if self.kind == "gpt" else {}
        call = CALLS[self.kind](*args, **kwargs, **with_logits)
        found, expected = len(call.arguments["inputs"]), len(self.keys["samples"])
        if found != expected:
            rule = f"must be given the {expected} samples of the micro-batch, as their numbers key the dropout masks"
            raise TrainingError(problem("The model", Words(f"{found} samples"), rule, "Call it once for each view"))
        arguments = {name: each for name, each in (call.arguments | self.keys).items() if each is not None}
        return Call(arguments, call.results)


class RecordingModel(StepModel):
    """What a train step gets as `model` with a pipeline: it takes the arguments, and the schedule calls the model."""

    def __call__(self, *args: Any, **kwargs: Any) -> PipelineOutput:
        """A stand-in for the output, to be returned as it is."""
        if self.call is not None:
            rule = "must call the model once with a pipeline, whose schedule runs each micro-batch once"
            raise TrainingError(problem("forward_step", Words("a second call"), rule, "Use one pipeline stage"))
        self.call = self.translated(*args, **kwargs)
        return PipelineOutput()


class PipelineOutput:
    """Stands for what the last stage of a pipeline will return. Only the loss function is given the output itself."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        rule = "must return the model's output as it is with a pipeline, where it is computed later, on the last stage"
        cure = "Compute in the function that get_loss_func returns"
        raise TrainingError(problem("forward_step", Words("a use of the output"), rule, cure))

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __int__ = __neg__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _refuse
    __matmul__ = __rmatmul__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._refuse(cls())


def call_gpt(
    input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None, *,
    labels: Tensor | None = None, loss_mask: Tensor | None = None, return_logits: bool = False, **others: Any,
) -> Call:  # fmt: skip
    """As GPTModel. loss_mask: Megatron's model takes it for other losses than this one, so that it changes nothing."""
    check_unused(others)
    documents = padding = None
    if attention_mask is not None and attention_mask.dim() > 2:
        documents = documents_of(attention_mask, "attention_mask")
    else:
        padding = attention_mask
    arguments = {"inputs": input_ids, "positions": position_ids, "documents": documents, "padding_mask": padding}
    if labels is None or not return_logits:
        return Call(arguments | {"labels": labels}, lambda output: output.float())

    def losses_and_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits, targets = logits.float(), labels.masked_fill(labels < 0, -100)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
        return losses.view(targets.shape), logits

    return Call(arguments, losses_and_logits)


def call_bert(
    input_ids: Tensor, attention_mask: Tensor | None = None, tokentype_ids: Tensor | None = None,
    lm_labels: Tensor | None = None, **others: Any,
) -> Call:  # fmt: skip
    """As BertModel: (losses or logits of tokens, logits of the segments' order [b, 2], or None without that head)."""
    arguments = call_classifier(input_ids, attention_mask, tokentype_ids, **others).arguments
    return Call(
        arguments | {"labels": lm_labels}, lambda output: output if isinstance(output, tuple) else (output, None)
    )


def call_classifier(
    input_ids: Tensor, attention_mask: Tensor | None = None, tokentype_ids: Tensor | None = None, **others: Any
) -> Call:  # fmt: skip
    """As Classification: logits [b, classes]."""
    check_unused(others)
    padding = padding_of(attention_mask, "attention_mask")
    arguments = {"inputs": input_ids, "padding_mask": padding, "token_types": tokentype_ids}
    return Call(arguments, lambda logits: logits.float())


def call_t5(
    encoder_input_ids: Tensor, decoder_input_ids: Tensor, encoder_attn_mask: Tensor | None = None,
    decoder_attn_mask: Tensor | None = None, encoder_decoder_attn_mask: Tensor | None = None,
    tokentype_ids: Tensor | None = None, lm_labels: Tensor | None = None, **others: Any,
) -> Call:  # fmt: skip
    """As T5Model: losses or logits of the decoder's tokens."""
    check_unused(others | {"tokentype_ids": tokentype_ids})
    padding, decoder_padding = padding_of(encoder_attn_mask, "encoder_attn_mask"), decoder_attn_mask
    if decoder_attn_mask is not None and decoder_attn_mask.dim() > 2:
        decoder_padding = None
        if documents_of(decoder_attn_mask, "decoder_attn_mask") is not None:
            raise wrong_mask("decoder_attn_mask", "several documents in a row", "must be causal and hide nothing else")
    across = padding_of(encoder_decoder_attn_mask, "encoder_decoder_attn_mask")
    if across is not None and (padding is None or not torch.equal(across.bool(), padding.bool())):
        raise wrong_mask("encoder_decoder_attn_mask", "another", "must hide what encoder_attn_mask hides")
    arguments = {"inputs": encoder_input_ids, "decoder_input_ids": decoder_input_ids, "padding_mask": padding,
                 "decoder_padding_mask": decoder_padding, "labels": lm_labels}  # fmt: skip
    return Call(arguments, lambda output: output.float())


CALLS: dict[str, Callable[..., Call]] = {
    "gpt": call_gpt, "bert": call_bert, "bert_classification": call_classifier, "t5": call_t5,
}  # fmt: skip


def with_megatron_names(kind: str, batch: Batch) -> Batch:
    """A batch of an indexed dataset with its tensors under Megatron's names too, for get_batch functions of the user's.

    text [b, s + 1] (gpt), text, types, is_random (bert), text_enc, text_dec (t5), and Megatron core's tokens and
    position_ids; labels, loss_mask and padding_mask have their names already.
    """
    ids, added = batch["input_ids"], {}
    if kind == "gpt":
        added = {"text": torch.cat((ids, batch["labels"][:, -1:]), dim=1), "tokens": ids}
        added |= {"position_ids": batch["positions"]} if "positions" in batch else {}
    elif kind == "bert":
        pairs = (("text", "input_ids"), ("types", "token_types"), ("is_random", "sentence_order"))
        added = {theirs: batch[ours] for theirs, ours in pairs if ours in batch}
    elif kind == "t5":
        added = {"text_enc": ids, "text_dec": batch["decoder_input_ids"]}
    return type(batch)({**added, **batch})


def padding_of(mask: Tensor | None, name: str) -> Tensor | None:
    """[b, s], True for tokens, of an encoder's mask: that already, or bool [b, q, s] or [b, 1, q, s], True for hidden.

    Raises TrainingError where the mask hides different tokens from different queries that are tokens themselves.
    """
    if mask is None or mask.dim() == 2:
        return mask
    visible = ~square(mask, name)
    keys = visible.any(dim=1)
    queries = visible.any(dim=2)
    if bool(((visible != keys[:, None]) & queries[..., None]).any()):
        raise wrong_mask(name, "different tokens for different queries", "must hide padding alone")
    return keys


def documents_of(mask: Tensor, name: str) -> Tensor | None:
    """[b, s], the number of each token's document, of a causal mask, bool [b, s, s] or [b, 1, s, s], True where hidden.

    None where there is one document. Raises TrainingError where the mask is not causal within documents.
    """
    visible = ~square(mask, name)
    documents = visible.int().argmax(dim=-1)  # the first token that a token sees
    if not torch.equal(visible, visible_in(documents)):
        raise wrong_mask(name, "one that is not", "must be causal within documents, and hide nothing else")
    return documents if bool(documents.any()) else None


def visible_in(documents: Tensor) -> Tensor:
    """bool [b, s, s], the causal mask within documents [b, s], True where a key is seen."""
    return (documents[:, :, None] == documents[:, None]).tril()


def square(mask: Tensor, name: str) -> Tensor:
    """bool [b, q, s] of a mask [b, q, s] or [b, 1, q, s]; TrainingError for others."""
    if mask.dtype != torch.bool or mask.dim() not in (3, 4) or (mask.dim() == 4 and mask.shape[1] != 1):
        found = f"{mask.dtype} {list(mask.shape)}"
        raise wrong_mask(
            name, found, "must be [b, s], 1 for tokens, or bool [b, s, s] or [b, 1, s, s], True where hidden"
        )
    return mask.flatten(0, 1) if mask.dim() == 4 else mask


def wrong_mask(name: str, found: str, rule: str) -> TrainingError:
    """The error on a mask that megalith's models do not describe."""
    cure = "Pass the tokenizer's attention_mask [b, s]; for other masks write a model of your own (CONTRIBUTING.md)"
    return TrainingError(problem(name, Words(found), rule, cure))


def check_unused(others: dict[str, Any]) -> None:
    """Raise TrainingError for arguments of Megatron's models that megalith's have no use for."""
    given = [name for name, value in others.items() if value is not None]
    if given:
        rule = "must be called with ids, masks, positions, types of tokens and labels alone"
        raise TrainingError(problem("The model", Words(", ".join(given)), rule, f"Leave out {', '.join(given)}"))
