"""Rules that one model alone has: which fields it has, which samples it learns from. Its record names its rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalith.config.architectures import ARCHITECTURES
from megalith.config.flags.text import Problem, Words, field_problem, flag
from megalith.config.flags.values import fields
from megalith.config.run import RunConfig
from megalith.config.sections.data import INSTRUCTIONS

BERTS = ("bert", "bert_classification", "bert_multiple_choice", "ict")
RETRO_FIELDS = (
    "retro_layer_numbers", "retro_encoder_layers", "retro_encoder_hidden_dropout", "retro_encoder_attention_dropout",
    "retro_gpt_chunk_length", "retro_num_neighbors", "retro_num_retrieved_chunks",
)  # fmt: skip
MODEL_ONLY_FIELDS: dict[str, tuple[str, ...]] = {  # field -> the models that have it
    "parallel_attn": ("gpt",),
    **dict.fromkeys(("embed_layernorm", "sliding_window", "scale_embeddings"), ("gpt", "retro")),
    **dict.fromkeys(RETRO_FIELDS, ("retro",)),
    "norm_after_residual": BERTS, "bert_no_binary_head": ("bert", "ict"),
    "num_classes": ("bert_classification",), "classifier_dropout": ("bert_classification", "bert_multiple_choice"),
    **dict.fromkeys(("biencoder_projection_dim", "biencoder_shared_query_context_model"), ("ict",)),
    **dict.fromkeys(("decoder_num_layers", "initializer_factor", "scale_output"), ("t5",)),
}  # fmt: skip
NO_SENTINELS = ("BertWordPieceLowerCase", "BertWordPieceCase")  # tokenizers without sentinels
ONE_DOCUMENT = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


def gpt_problems(config: RunConfig) -> Iterator[Problem]:
    """What a GPT cannot work with."""
    m, d = config.model, config.data
    yield from unsupported_forms(config, "gpt")
    if m.positions == "relative":
        rule = "is a bias that T5 alone has"
        cure = "Leave it out, or write --position-embedding-type alibi"
        what = "--position-embedding-type relative"
        yield field_problem(("position_embedding_type",), what, Words(f"it with {m.model_type}"), rule, cure)
    for name, value, usual in (("dataset", d.dataset, "gpt"), ("loss", d.loss, "lm")):
        if value not in (usual, *INSTRUCTIONS) and value in fields()[name].metadata["names"]:
            rule = f"must be {usual!r} for {m.model_type}"
            cure = "Leave it out" + f", or train {value}" * (value in ARCHITECTURES)
            yield field_problem((name,), flag(name), value, rule, cure)


def bert_problems(config: RunConfig, kind: str = "bert") -> Iterator[Problem]:
    """What a BERT cannot work with. kind: which BERT it is, by its heads."""
    m, d = config.model, config.data
    yield from unsupported_forms(config, kind)
    if m.positions != "learned_absolute":
        cure = "Leave it out; the default is learned_absolute"
        yield _positions_problem(config, "must be learned_absolute for BERT, which learns its positions", cure)
    if m.norm_after_residual and m.apply_residual_connection_post_layernorm:
        both = ("norm_after_residual", "apply_residual_connection_post_layernorm")
        cure = "Leave out --apply-residual-connection-post-layernorm"
        rule = "excludes --apply-residual-connection-post-layernorm, because a layer has one form"
        yield field_problem(both, "--norm-after-residual", Words("both"), rule, cure)
    yield from mismatched_training_data(config)
    yield from multi_document_fields(config, "BERT")
    if d.dataset == "bert" and d.seq_length is not None and d.seq_length < 8:
        rule = "must be at least 8, because a sample has [CLS], two segments and a [SEP] after each"
        yield field_problem(("seq_length",), "--seq-length", d.seq_length, rule, "Write --seq-length 512")


def _positions_problem(config: RunConfig, rule: str, cure: str) -> Problem:
    about: tuple[str, ...] = ("position_embedding_type",)
    if config.model.use_rotary_position_embeddings:  # which has set them
        about = ("position_embedding_type", "use_rotary_position_embeddings")
        cure = "Leave out --use-rotary-position-embeddings"
    return field_problem(about, "--position-embedding-type", config.model.positions, rule, cure)


def classification_problems(config: RunConfig) -> Iterator[Problem]:
    """What a BERT with a classification head cannot work with."""
    classes, loss = config.model.num_classes, config.data.loss
    if loss in ("classification", "regression") and (classes == 1) != (loss == "regression"):
        rule = "must be 1, a number for each sample" if classes > 1 else "must be at least 2"
        cure = "Write --num-classes 1" if classes > 1 else "Write --loss regression, or --num-classes 2"
        yield field_problem(("num_classes", "loss"), f"--num-classes, for --loss {loss},", classes, rule, cure)
    if loss == "regression":  # of the same model
        config = config.replace(loss="classification")
    yield from bert_problems(config, "bert_classification")


def multiple_choice_problems(config: RunConfig) -> Iterator[Problem]:
    """What a BERT with a multiple-choice head cannot work with."""
    return bert_problems(config, "bert_multiple_choice")


def ict_problems(config: RunConfig) -> Iterator[Problem]:
    """What a bi-encoder cannot work with."""
    yield from bert_problems(config, "ict")
    ks = config.retriever.retriever_report_topk_accuracies
    if wrong := [k for k in ks if k < 1]:
        name = "retriever_report_topk_accuracies"
        rule, cure = "must be whole numbers above 0", f"Write {flag(name)} 1 5"
        yield field_problem((name,), flag(name), wrong[0], rule, cure)
    r, both = config.retriever, ("train_with_neg", "train_hard_neg")
    if r.train_with_neg != (r.train_hard_neg > 0):
        found = Words(f"--train-hard-neg {r.train_hard_neg}" + " and --train-with-neg" * r.train_with_neg)
        rule = "must be given with --train-hard-neg above 0, and not without"
        yield field_problem(both, "--train-with-neg", found, rule, "Write --train-with-neg --train-hard-neg 1")
    if config.retriever.bert_load and config.lora.lora_rank:
        both, rule = ("bert_load", "lora_rank"), "must be 0, because towers that begin with a BERT are trained whole"
        cure = "Train the towers first, then adapters on them with --load"
        yield field_problem(both, "--lora-rank", config.lora.lora_rank, rule, cure)


def t5_problems(config: RunConfig) -> Iterator[Problem]:
    """What a T5 cannot work with."""
    m, d = config.model, config.data
    yield from unsupported_forms(config, "t5")
    if m.positions not in ("learned_absolute", "relative", "none"):
        rule = "must be learned_absolute (Megatron's), relative (T5's own) or none for T5"
        yield _positions_problem(config, rule, "Write --position-embedding-type relative, or leave it out")
    exact = m.relative_attention_num_buckets // 2
    if m.positions == "relative" and m.relative_attention_max_distance <= exact:
        rule = f"must be above {exact}: the first {exact} of --relative-attention-num-buckets are for one distance "
        rule += "each, the others for those above"
        about = ("relative_attention_max_distance", "relative_attention_num_buckets")
        cure = f"Write --relative-attention-max-distance {4 * exact}"
        yield field_problem(about, flag(about[0]), m.relative_attention_max_distance, rule, cure)
    length, longest = d.decoder_seq_length or 0, m.max_position_embeddings
    if m.positions == "learned_absolute" and longest and length > longest:
        rule = f"must be at most --max-position-embeddings, {longest}"
        cure = f"Write --max-position-embeddings {length}, or --decoder-seq-length {longest}"
        about = ("decoder_seq_length", "max_position_embeddings")
        yield field_problem(about, "--decoder-seq-length", length, rule, cure)
    if d.dataset == "t5" and d.tokenizer_type in NO_SENTINELS and not d.vocab_extra_ids:
        rule = "must be above 0 for T5, which marks masked spans with sentinels that the vocabulary lacks"
        yield field_problem(("vocab_extra_ids",), "--vocab-extra-ids", 0, rule, "Write --vocab-extra-ids 100")
    yield from mismatched_training_data(config)
    yield from multi_document_fields(config, "T5")


def unsupported_forms(config: RunConfig, kind: str) -> Iterator[Problem]:
    """Fields that are set though `kind` has no such form."""
    values: dict[str, Any] = config.flat()
    for name, models in MODEL_ONLY_FIELDS.items():
        if kind not in models and values[name] != fields()[name].default:
            title = models[0].upper() if models[0].isalnum() else models[0]
            rule = f"is for {title} alone"
            found, cure = Words(f"it with {config.model.model_type}"), f"Leave it out, or train {models[0]}"
            yield field_problem((name,), flag(name), found, rule, cure)


def mismatched_training_data(config: RunConfig) -> Iterator[Problem]:
    """A built-in dataset or loss that belongs to another model."""
    architecture, kind = config.model.architecture, config.model.model_type
    for name, usual in (("dataset", architecture.dataset), ("loss", architecture.loss)):
        value = getattr(config.data, name)
        taken = (usual, *(INSTRUCTIONS if architecture.decoder else ("nq",) if usual == "ict" else ()))
        if value in taken or value not in fields()[name].metadata["names"]:
            continue
        if usual is None:
            rule = f"must be module:name of your own for {kind}, because megalith has no {name} for it"
            cure = f"Write --{name} module:name"
        else:
            rule, cure = f"must be {usual!r} for {kind}", f"Write --{name} {usual}, or leave it out"
        yield field_problem((name,), flag(name), value, rule, cure)


def multi_document_fields(config: RunConfig, title: str) -> Iterator[Problem]:
    """Fields for samples of several documents."""
    for name in ONE_DOCUMENT:
        if getattr(config.data, name):
            rule = f"has no meaning for {title}, whose samples are of one document each"
            yield field_problem((name,), flag(name), True, rule, "Leave it out")
