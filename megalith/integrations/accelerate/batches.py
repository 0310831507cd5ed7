"""Batches of transformers as tasks of megalith take them, cut into micro-batches, and outputs in transformers' classes.

    batch = to_batch(kind, {"input_ids": ..., "labels": ...}, session)
    micro_batches = split(batch, number, session.config)
    output = outputs(session, loss, cut(logits, batch))

Losses, gradients and logits are those of the transformers class, with its sdpa attention where it has that.
Shapes: b samples, s tokens, t tokens of a decoder, V vocabulary.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words, nearest
from megalith.config.run import RunConfig
from megalith.runtime.build import Runtime
from megalith.training.tasks import Batch, sample_mask

if TYPE_CHECKING:
    from megalith.integrations.accelerate.session import Session

IGNORED = -100  # the label of what has no loss
ENCODER = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels")
TENSORS = {  # kind of model (parsers.py: kind_of) -> what its batches may have
    "gpt": ENCODER,
    "bert": (*ENCODER, "next_sentence_label"),
    "bert_classification": ENCODER,
    "t5": ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels"),
}
# Arguments of transformers that are no tensors, and their values here.
OPTIONS = {"use_cache": False, "output_attentions": False, "output_hidden_states": False, "logits_to_keep": 0}
REFUSED = {  # argument of transformers -> (rule, cure)
    "num_items_in_batch": (
        "is not taken, as the loss of a call is the mean over its unmasked tokens on all data-parallel processes",
        "Leave it out, and for sums over several calls scale the losses: accelerator.backward(loss * weight)",
    ),
    **dict.fromkeys(
        ("inputs_embeds", "decoder_inputs_embeds", "encoder_outputs", "past_key_values"),
        ("is not taken, as hidden states do not leave their layout", "Give input_ids"),
    ),
}
FILL = {"labels": IGNORED, "documents": -1}  # of tokens that `split` adds; 0 in all other tensors
WEIGHTS = ("loss_mask", "order_mask")  # 0 in samples that `split` adds


class IndexedBatch(dict[str, Tensor]):
    """A batch of an indexed dataset: it is in megalith's terms already."""


def to_batch(kind: str, given: Mapping[str, Any], session: Session) -> Batch:
    """A batch of transformers' names as the task of this kind of model takes it; without labels there is no loss.

    given: the keyword arguments of transformers' model; None is as if it were not there. A mask of ones is left out, so
    that attention has its fast path. position_ids that begin anew within a row are texts of their own where they are in
    transformers: with use_cache=False and without an attention mask.
    Raises ConfigError for what is not known, has another shape, or cannot mean here what it means there.
    """
    tensors = _checked(kind, given)
    ids = tensors["input_ids"]
    config = session.config.model
    if config.positions == "learned_absolute" and ids.shape[1] > config.max_position_embeddings:
        rule = f"must be at most {config.max_position_embeddings}, the positions that the model has"
        raise ConfigError(problem("The length of input_ids", ids.shape[1], rule, "Truncate the texts"))
    batch = {"input_ids": ids, **_mask(tensors, "attention_mask", "padding_mask")}
    batch |= _MAKERS[kind](tensors, batch, session)
    if "position_ids" in tensors:
        batch |= _positions(kind, tensors, given.get("use_cache"), session)
    return batch


def _checked(kind: str, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch, of the right shapes; ids and labels are int64."""
    given = {name: value for name, value in given.items() if value is not None and name != "return_dict"}
    tensors: dict[str, Tensor] = {}
    for name, value in given.items():
        if name in REFUSED:
            raise ConfigError(problem(f"model({name}=...)", Words("a value"), *REFUSED[name]))
        if name in OPTIONS:
            if isinstance(value, Tensor) or value != OPTIONS[name]:
                cure = "Leave it out; for texts there is megatron_generate"
                raise ConfigError(problem(f"model({name}=...)", value, f"must be {OPTIONS[name]} here", cure))
        elif name not in TENSORS[kind]:
            near = nearest(name, TENSORS[kind])
            rule = f"must be one of {', '.join(TENSORS[kind])}"
            cure = f"Write {near}, or take it out of the batch" if near else "Take it out of the batch"
            raise ConfigError(problem("A key of the batch", name, rule, cure))
        elif not isinstance(value, Tensor):
            cure = "Convert it in the collate function: torch.tensor(...)"
            raise ConfigError(problem(f"{name} of the batch", Words(type(value).__name__), "must be a tensor", cure))
        else:
            tensors[name] = value if value.is_floating_point() else value.long()
    if "input_ids" not in tensors or tensors["input_ids"].dim() != 2:
        found = list(tensors["input_ids"].shape) if "input_ids" in tensors else Words("none")
        raise ConfigError(problem("input_ids", found, "must be there, [samples, tokens]", "Give the model input_ids"))
    _check_shapes(kind, tensors)
    return tensors


def _check_shapes(kind: str, tensors: Mapping[str, Tensor]) -> None:
    b, s = tensors["input_ids"].shape
    target = [tensors[name].shape[-1] for name in ("decoder_input_ids", "labels") if name in tensors]
    for name, tensor in tensors.items():
        wanted, what, found = [b, s], "as input_ids", list(tensor.shape)
        if kind == "t5" and (name.startswith("decoder_") or name == "labels"):
            wanted, what = [b, *target[:1]], "samples x tokens of the decoder"
        if name == "next_sentence_label" or (kind, name) == ("bert_classification", "labels"):
            wanted, what, found = [b], "one for each sample", found[:1] if found[1:] == [1] else found
        if name == "position_ids" and found == [1, s]:
            continue
        if (kind, name) == ("bert_classification", "labels") and tensor.is_floating_point():
            continue  # of another problem: see _bert_classification
        if tensor.is_floating_point() and not name.endswith("attention_mask"):
            cure = "Convert it in the collate function: .long()"
            raise ConfigError(problem(name, Words(str(tensor.dtype)), "must be integers", cure))
        if found != wanted:
            cure = "Correct it in the collate function"
            if name.endswith("attention_mask"):
                cure = "Give a mask of tokens, [samples, tokens]; masks of queries x keys are not taken"
            raise ConfigError(problem(name, found, f"must be {wanted}, {what}", cure))


def _mask(tensors: Mapping[str, Tensor], name: str, mask_name: str) -> Batch:
    """The mask of tokens under the name `mask_name`, bool; nothing where it hides nothing."""
    if name not in tensors or bool((mask := tensors[name].bool()).all()):
        return {}
    return {mask_name: mask}


def _labels(labels: Tensor) -> Batch:
    """Labels and their loss mask, 0 where the label is -100."""
    if bool(((labels < 0) & (labels != IGNORED)).any()):
        rule = f"must be ids of tokens, or {IGNORED} where there is no loss"
        cure = f"Replace other negative labels by {IGNORED}"
        raise ConfigError(problem("labels", int(labels[labels != IGNORED].min()), rule, cure))
    return {"labels": labels, "loss_mask": (labels != IGNORED).float()}


def _gpt(tensors: Mapping[str, Tensor], batch: Batch, session: Session) -> Batch:
    hf_config = session.hf_config
    if "token_type_ids" in tensors and (hf_config.model_type == "gpt2" or bool(tensors["token_type_ids"].any())):
        found, rule = Words(hf_config.model_type), "is not there in this model"
        cure = "Take it out of the batch: tokenizer(..., return_token_type_ids=False)"
        raise ConfigError(problem("token_type_ids", found, rule, cure))
    made = {}
    if "labels" in tensors:  # of each token's next one
        made = _labels(F.pad(tensors["labels"][:, 1:], (0, 1), value=IGNORED))
    if "padding_mask" in batch and (hf_config.model_type == "bloom" or getattr(hf_config, "alibi", False)):
        _check_alibi_padding(batch["padding_mask"], made.get("labels"))
    return made


def _check_alibi_padding(mask: Tensor, labels: Tensor | None) -> None:
    """Raise ConfigError where transformers' ALiBi is another one than the distance of tokens."""
    begins = mask & ~F.pad(mask[:, :-1], (1, 0))
    if bool((begins.sum(dim=1) > 1).any()):
        found, rule = Words("gaps between tokens"), "must be padding before or after the tokens of a row with ALiBi"
        raise ConfigError(problem("attention_mask", found, rule, "Put the padding at one end of each row"))
    _check_blind(mask, labels, "with ALiBi")


def _check_blind(mask: Tensor, labels: Tensor | None, when: str) -> None:
    """Raise ConfigError where padding before the first token has a label, and transformers lets it see all tokens."""
    count = 0 if labels is None else int(((mask.cumsum(dim=1) == 0) & (labels != IGNORED)).sum())
    if count:
        rule = f"must have no loss {when}: transformers predicts there from all tokens of the row, those to come too"
        cure = (
            f"Pad on the right (tokenizer.padding_side = 'right'), or give the label {IGNORED} to padding and to the "
            f"first token of each row, which the padding before it predicts"
        )
        raise ConfigError(problem("Padding before the tokens of a row", Words(f"{count} labels"), rule, cure))


def _bert(tensors: Mapping[str, Tensor], batch: Batch, session: Session) -> Batch:
    binary, made = not session.config.model.bert_no_binary_head, _token_types(tensors, session)
    orders = "next_sentence_label" in tensors
    if orders and not binary:
        rule, cure = "is for a model with a head for it", "Take it out, or use the ForPreTraining class"
        raise ConfigError(problem("next_sentence_label", Words("a model without"), rule, cure))
    if binary and orders != ("labels" in tensors):
        found = Words("only next_sentence_label" if orders else "only labels")
        rule = "must have both labels and next_sentence_label, whose losses are added, or none of them"
        raise ConfigError(problem("A batch for pre-training", found, rule, "Give both, or use the ForMaskedLM class"))
    if "labels" in tensors:
        made |= _labels(tensors["labels"])
    if orders:
        order = tensors["next_sentence_label"].view(-1)
        made |= {"sentence_order": order.clamp(min=0), "order_mask": (order != IGNORED).float()}
    return made


def _token_types(tensors: Mapping[str, Tensor], session: Session) -> Batch:
    if "token_type_ids" not in tensors:
        return {}
    types = tensors["token_type_ids"]
    if not session.config.model.bert_no_binary_head:
        return {"token_types": types}
    if bool(types.any()):
        rule = "must be 0 for a model without binary head, which has one segment"
        raise ConfigError(problem("token_type_ids", int(types.max()), rule, "Use the ForPreTraining class, or 0"))
    return {}


def _bert_classification(tensors: Mapping[str, Tensor], batch: Batch, session: Session) -> Batch:
    made, config = _token_types(tensors, session), session.hf_config
    if "labels" not in tensors:
        return made
    labels = tensors["labels"].view(-1)
    kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    kind = getattr(config, "problem_type", None) or ("regression" if config.num_labels == 1 else kind)
    if kind != "single_label_classification":
        rule = "must be single_label_classification: each sample one of several classes, an integer"
        raise ConfigError(problem("The problem of the labels", kind, rule, "Take logits, and compute the loss of them"))
    _labels(labels)
    return made | {"labels": labels.clamp(min=0), "loss_mask": (labels != IGNORED).float()}


def _t5(tensors: Mapping[str, Tensor], batch: Batch, session: Session) -> Batch:
    made = _labels(tensors["labels"]) if "labels" in tensors else {}
    if "decoder_input_ids" in tensors:
        made["decoder_input_ids"] = tensors["decoder_input_ids"]
    elif made:
        made["decoder_input_ids"] = shift_right(made["labels"], session.hf_config)
    else:
        found, rule = Words("neither"), "must be there, one of them"
        raise ConfigError(problem("decoder_input_ids or labels", found, rule, "Give the decoder's tokens"))
    made |= _mask(tensors, "decoder_attention_mask", "decoder_key_padding_mask")
    if "decoder_key_padding_mask" in made:
        _check_blind(made["decoder_key_padding_mask"], made.get("labels"), "in a decoder")
    return made


def shift_right(labels: Tensor, hf_config: Any) -> Tensor:
    """The decoder's inputs [b, t] for labels [b, t]: its start token, then each label; -100 becomes padding."""
    start, padding = hf_config.decoder_start_token_id, hf_config.pad_token_id
    for name, token in (("decoder_start_token_id", start), ("pad_token_id", padding)):
        if token is None:
            rule = "must be set, to make decoder_input_ids of labels"
            raise ConfigError(problem(f"model.config.{name}", None, rule, "Set it, as to 0 for T5"))
    shifted = F.pad(labels[:, :-1], (1, 0), value=start)
    return torch.where(shifted == IGNORED, padding, shifted)


_MAKERS = {"gpt": _gpt, "bert": _bert, "bert_classification": _bert_classification, "t5": _t5}


def _positions(kind: str, tensors: Mapping[str, Tensor], use_cache: bool | None, session: Session) -> Batch:
    """The positions of the tokens, and of packed texts their numbers (`documents`)."""
    form = session.config.model.positions
    if form not in ("learned_absolute", "rope"):
        rule = "must be for a model with learned or rotary positions"
        raise ConfigError(problem("position_ids", Words(form), rule, "Take it out of the batch"))
    positions = tensors["position_ids"].expand(tensors["input_ids"].shape)
    documents = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(dim=1)
    # Falcon does not tell its mask the positions.
    packed = kind == "gpt" and "attention_mask" not in tensors and session.hf_config.model_type != "falcon"
    if not packed or not bool(documents.any()):
        return {"positions": positions}
    if getattr(session.hf_config, "use_cache", True) if use_cache is None else use_cache:
        warnings.warn(
            "position_ids begin anew within a row: as in transformers with use_cache=True, the texts of a row see one "
            "another. model(..., use_cache=False) or model.config.use_cache = False keeps them apart.",
            stacklevel=3,
        )
        return {"positions": positions}
    return {"positions": positions, "documents": documents}


def split(batch: Batch, number: int, config: RunConfig | None = None) -> list[Batch]:
    """`number` micro-batches of equal shapes, each of ceil(b / number) samples.

    Where samples are lacking, copies of the last one follow it, which count in no loss; `cut` takes off their logits.
    config: where it is given, sequences are padded at their ends to a length that its layout can split.
    """
    if config is not None:
        batch = _pad_sequences(batch, config)
    rows = len(batch["input_ids"])
    size = -(-rows // number)
    if lacking := size * number - rows:
        if "sentence_order" in batch:  # each of which counts if nothing says otherwise
            batch = {**batch, "order_mask": sample_mask(batch, "order_mask")}
        batch = {name: _repeat_last(tensor, lacking, name in WEIGHTS) for name, tensor in batch.items()}
    return [{name: tensor[i * size : (i + 1) * size] for name, tensor in batch.items()} for i in range(number)]


def _repeat_last(tensor: Tensor, times: int, as_zeros: bool) -> Tensor:
    last = tensor[-1:].expand(times, *tensor.shape[1:])
    return torch.cat((tensor, torch.zeros_like(last) if as_zeros else last))


def _pad_sequences(batch: Batch, config: RunConfig) -> Batch:
    """Sequences [b, s] and [b, t] with tokens at their ends that nothing sees and that have no loss."""
    unit, decoder = sequence_unit(config), "decoder_input_ids" in batch
    bidirectional = decoder or not config.model.causal
    lacking = {name: -tensor.shape[1] % unit for name, tensor in batch.items() if tensor.dim() > 1}
    if bidirectional and lacking["input_ids"] and "padding_mask" not in batch:
        batch = {**batch, "padding_mask": torch.ones_like(batch["input_ids"], dtype=torch.bool)}
        lacking["padding_mask"] = lacking["input_ids"]
    length, most = batch["input_ids"].shape[1] + lacking["input_ids"], config.model.max_position_embeddings
    if config.model.positions == "learned_absolute" and length > most:
        rule = f"must be at most {most}, the positions that the model has, and a multiple of {unit} in this layout"
        cure = f"Truncate the texts to {most // unit * unit} tokens"
        raise ConfigError(problem("The length of input_ids", batch["input_ids"].shape[1], rule, cure))
    return {
        name: F.pad(tensor, (0, lacking[name]), value=FILL.get(name, 0)) if lacking.get(name) else tensor
        for name, tensor in batch.items()
    }


def sequence_unit(config: RunConfig) -> int:
    """What a layout divides the length of a sequence by: context-parallel chunks, ranks of sequence parallelism."""
    parallel = config.parallel
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    return math.lcm(2 * cp if cp > 1 else 1, tp * cp if parallel.sequence_parallel else 1)


def cut(logits: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
    """Logits [b, s, V] or [b, classes] of the samples and tokens of a batch, without those that `split` has added."""
    rows, length = batch.get("decoder_input_ids", batch["input_ids"]).shape
    return tuple(each[:rows, :length] if each.dim() == 3 else each[:rows] for each in logits)


def outputs(
    session: Session, loss: Tensor | None, logits: Sequence[Tensor] | None, return_dict: bool | None = None
) -> Any:
    """What transformers' class returns: an object with `loss` and `logits`, or a tuple of those that are there.

    logits: [b, s, V], for BERT's pre-training also [b, 2], or [b, classes]. return_dict: None is as the config says.
    """
    from transformers import modeling_outputs

    model, hf_config = session.config.model, session.hf_config
    first = None if logits is None else logits[0]
    if model.decoder_layers:
        made = modeling_outputs.Seq2SeqLMOutput(loss=loss, logits=first)
    elif model.model_type == "bert_classification":
        made = modeling_outputs.SequenceClassifierOutput(loss=loss, logits=first)
    elif not model.causal and model.bert_no_binary_head:
        made = modeling_outputs.MaskedLMOutput(loss=loss, logits=first)
    elif not model.causal:
        family = {"megatron-bert": ("megatron_bert", "MegatronBert")}.get(hf_config.model_type, ("bert", "Bert"))
        module = importlib.import_module(f"transformers.models.{family[0]}.modeling_{family[0]}")
        second = None if logits is None else logits[1]
        output = getattr(module, f"{family[1]}ForPreTrainingOutput")
        made = output(loss=loss, prediction_logits=first, seq_relationship_logits=second)
    elif hf_config.model_type in ("gpt2", "bloom", "falcon"):
        made = modeling_outputs.CausalLMOutputWithCrossAttentions(loss=loss, logits=first)
    else:
        made = modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=first)
    as_object = getattr(hf_config, "return_dict", True) if return_dict is None else return_dict
    return made if as_object else made.to_tuple()


def keep_padding_idx(runtime: Runtime, hf_model: Any) -> None:
    """Give the embedding of padding no gradient as an input, where the transformers model gives it none."""
    for stage in runtime.stages:
        embedding = getattr(stage.model, "embedding", None)
        if embedding is not None:
            embedding.padding_idx = hf_model.get_input_embeddings().padding_idx
