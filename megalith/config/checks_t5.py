"""Rules of encoder-decoder models, and of what only they have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalith.config.run import RunConfig
from megalith.config.text import Problem, Words, flag, trouble

ONLY_T5 = {"decoder_num_layers": None, "initializer_factor": None, "scale_output": False}  # field -> what it is for all others
NO_SENTINELS = ("BertWordPieceLowerCase", "BertWordPieceCase")  # tokenizers that have none of their own


def t5_problems(config: RunConfig) -> Iterator[Problem]:
    """What of the model and its data cannot work together."""
    m, d = config.model, config.data
    if m.model_type in ("gpt", "bert"):
        yield from _only_t5(config)
    if m.model_type != "t5":
        return
    if m.positions not in ("learned_absolute", "relative", "none"):
        rule = "T5 has learned_absolute (Megatron's), relative (its own) or none"
        cure = "Write --position-embedding-type relative, or leave it out"
        yield trouble(("position_embedding_type",), "--position-embedding-type", m.positions, rule, cure)
    for name in ("embed_layernorm", "parallel_attn", "sliding_window", "scale_embeddings"):
        if getattr(m, name):
            yield trouble((name,), flag(name), getattr(m, name), "it is a form of GPT", "Leave it out, or train gpt")
    exact = m.relative_attention_num_buckets // 2
    if m.positions == "relative" and m.relative_attention_max_distance <= exact:
        rule = f"the first {exact} of --relative-attention-num-buckets are for one distance each, the others for those above"
        about = ("relative_attention_max_distance", "relative_attention_num_buckets")
        yield trouble(about, flag(about[0]), m.relative_attention_max_distance, rule, f"Write {flag(about[0])} {4 * exact}")
    length, places = d.decoder_seq_length or 0, m.max_position_embeddings
    if m.positions == "learned_absolute" and places and length > places:
        rule = f"it is at most --max-position-embeddings, {places}"
        cure = f"Write --max-position-embeddings {length}, or --decoder-seq-length {places}"
        yield trouble(("decoder_seq_length", "max_position_embeddings"), "--decoder-seq-length", length, rule, cure)
    if d.dataset == "t5" and d.tokenizer_type in NO_SENTINELS and not d.vocab_extra_ids:
        rule = "T5 marks masked runs with sentinels, which the vocabulary lacks"
        yield trouble(("vocab_extra_ids",), "--vocab-extra-ids", 0, rule, "Write --vocab-extra-ids 100")
    for name, others in {"dataset": ("gpt", "bert", "ict"), "loss": ("lm", "bert")}.items():
        if getattr(d, name) in others:
            rule, cure = f"t5 learns from the {name} 't5'", f"Write --{name} t5, or leave it out"
            yield trouble((name,), flag(name), getattr(d, name), rule, cure)
    for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
        if getattr(d, name):
            yield trouble((name,), flag(name), True, "samples of T5 are of one document each", "Leave it out")


def _only_t5(config: RunConfig) -> Iterator[Problem]:
    values: dict[str, Any] = config.flat()
    kind = config.model.model_type
    for name, without in ONLY_T5.items():
        if values[name] != without:
            yield trouble((name,), flag(name), Words(f"with {kind}"), "T5 alone has it", "Leave it out, or train t5")
    if config.model.positions == "relative":
        rule, cure = "T5 alone has a bias of that kind", "Leave it out, or write --position-embedding-type alibi"
        yield trouble(("position_embedding_type",), "--position-embedding-type relative", Words(f"with {kind}"), rule, cure)
