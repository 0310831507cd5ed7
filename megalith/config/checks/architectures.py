"""Rules that one model alone has: which forms it may take, which samples it learns from. Its record names its
rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalith.config.architectures import ARCHITECTURES
from megalith.config.flags.text import Problem, Words, flag, trouble
from megalith.config.flags.values import fields
from megalith.config.run import RunConfig

BERTS = ("bert", "bert_classification", "bert_multiple_choice")
FORMS: dict[str, tuple[str, ...]] = {  # field of the model -> the models that have such a form
    **dict.fromkeys(("embed_layernorm", "parallel_attn", "sliding_window", "scale_embeddings"), ("gpt",)),
    "norm_after_residual": BERTS, "bert_no_binary_head": ("bert",),
    "num_classes": ("bert_classification",), "classifier_dropout": ("bert_classification", "bert_multiple_choice"),
    **dict.fromkeys(("decoder_num_layers", "initializer_factor", "scale_output"), ("t5",)),
}  # fmt: skip
NO_SENTINELS = ("BertWordPieceLowerCase", "BertWordPieceCase")  # tokenizers that have none of their own
ONE_DOCUMENT = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


def gpt_problems(config: RunConfig) -> Iterator[Problem]:
    """Those of a GPT."""
    m, d = config.model, config.data
    yield from forms(config, "gpt")
    if m.positions == "relative":
        rule, cure = "T5 alone has a bias of that kind", "Leave it out, or write --position-embedding-type alibi"
        what = "--position-embedding-type relative"
        yield trouble(("position_embedding_type",), what, Words(f"with {m.model_type}"), rule, cure)
    for name, value, usual in (("dataset", d.dataset, "gpt"), ("loss", d.loss, "lm")):
        if value != usual and value in fields()[name].metadata["names"]:
            cure = "Leave it out" + f", or train {value}" * (value in ARCHITECTURES)
            yield trouble((name,), flag(name), value, f"{m.model_type} learns from the {name} {usual!r}", cure)


def bert_problems(config: RunConfig, kind: str = "bert") -> Iterator[Problem]:
    """Those of a BERT. kind: which of them it is, by its heads."""
    m, d = config.model, config.data
    yield from forms(config, kind)
    if m.positions != "learned_absolute":
        cure = "Leave it out; the default is learned_absolute"
        rule = "BERT learns its positions"
        yield trouble(("position_embedding_type",), "--position-embedding-type", m.positions, rule, cure)
    if m.norm_after_residual and m.apply_residual_connection_post_layernorm:
        both = ("norm_after_residual", "apply_residual_connection_post_layernorm")
        cure = "Leave out --apply-residual-connection-post-layernorm"
        also = Words("also --apply-residual-connection-post-layernorm")
        yield trouble(both, "--norm-after-residual", also, "a layer has one form", cure)
    yield from learns_from(config)
    yield from one_document(config, "BERT")
    if d.dataset == "bert" and d.seq_length is not None and d.seq_length < 8:
        rule = "a sample has [CLS], two segments and a [SEP] after each: it is at least 8"
        yield trouble(("seq_length",), "--seq-length", d.seq_length, rule, "Write --seq-length 512")


def classification_problems(config: RunConfig) -> Iterator[Problem]:
    """Those of a BERT with a classification head."""
    return bert_problems(config, "bert_classification")


def multiple_choice_problems(config: RunConfig) -> Iterator[Problem]:
    """Those of a BERT with a multiple-choice head."""
    return bert_problems(config, "bert_multiple_choice")


def t5_problems(config: RunConfig) -> Iterator[Problem]:
    """Those of a T5."""
    m, d = config.model, config.data
    yield from forms(config, "t5")
    if m.positions not in ("learned_absolute", "relative", "none"):
        rule = "T5 has learned_absolute (Megatron's), relative (its own) or none"
        cure = "Write --position-embedding-type relative, or leave it out"
        yield trouble(("position_embedding_type",), "--position-embedding-type", m.positions, rule, cure)
    exact = m.relative_attention_num_buckets // 2
    if m.positions == "relative" and m.relative_attention_max_distance <= exact:
        rule = f"the first {exact} of --relative-attention-num-buckets are for one distance each, the others for "
        rule += "those above"
        about = ("relative_attention_max_distance", "relative_attention_num_buckets")
        cure = f"Write --relative-attention-max-distance {4 * exact}"
        yield trouble(about, flag(about[0]), m.relative_attention_max_distance, rule, cure)
    length, places = d.decoder_seq_length or 0, m.max_position_embeddings
    if m.positions == "learned_absolute" and places and length > places:
        rule = f"it is at most --max-position-embeddings, {places}"
        cure = f"Write --max-position-embeddings {length}, or --decoder-seq-length {places}"
        yield trouble(("decoder_seq_length", "max_position_embeddings"), "--decoder-seq-length", length, rule, cure)
    if d.dataset == "t5" and d.tokenizer_type in NO_SENTINELS and not d.vocab_extra_ids:
        rule = "T5 marks masked runs with sentinels, which the vocabulary lacks"
        yield trouble(("vocab_extra_ids",), "--vocab-extra-ids", 0, rule, "Write --vocab-extra-ids 100")
    yield from learns_from(config)
    yield from one_document(config, "T5")


def forms(config: RunConfig, kind: str) -> Iterator[Problem]:
    """Forms that only other models have than `kind`."""
    values: dict[str, Any] = config.flat()
    for name, models in FORMS.items():
        if kind not in models and values[name] != fields()[name].default:
            title = models[0].upper() if models[0].isalnum() else models[0]
            rule = f"{title} alone has it" if title == "T5" else f"it is a form of {title}"
            found, cure = Words(f"with {config.model.model_type}"), f"Leave it out, or train {models[0]}"
            yield trouble((name,), flag(name), found, rule, cure)


def learns_from(config: RunConfig) -> Iterator[Problem]:
    """Samples or a loss of ours that are those of another model."""
    architecture, kind = config.model.architecture, config.model.model_type
    for name, usual in (("dataset", architecture.dataset), ("loss", architecture.loss)):
        value = getattr(config.data, name)
        if value == usual or value not in fields()[name].metadata["names"]:
            continue
        if usual is None:
            rule, cure = f"there is no {name} for {kind} here", f"Name your own, --{name} module:name"
        else:
            rule, cure = f"{kind} learns from the {name} {usual!r}", f"Write --{name} {usual}, or leave it out"
        yield trouble((name,), flag(name), value, rule, cure)


def one_document(config: RunConfig, title: str) -> Iterator[Problem]:
    """Fields for samples of several documents."""
    for name in ONE_DOCUMENT:
        if getattr(config.data, name):
            yield trouble((name,), flag(name), True, f"samples of {title} are of one document each", "Leave it out")
