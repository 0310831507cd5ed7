"""Rules of the model's shape and number formats."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megalith.config.flags.text import Problem, Words, around, divisors, field_problem, flag, multiples
from megalith.config.run import RunConfig

REQUIRED = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12}


def model_problems(config: RunConfig) -> Iterator[Problem]:
    """What of the sections model, precision and data cannot work together."""
    m, sequence = config.model, config.data.seq_length
    for name, example in REQUIRED.items():
        if getattr(m, name) is None and not config.checkpoint.use_checkpoint_args:
            cure = f"Write {flag(name)} {example}, or start from a recipe with --recipe"
            if config.checkpoint.load:
                cure = f"Write --use-checkpoint-args: the model is that of {config.checkpoint.load}"
            yield field_problem((name,), flag(name), None, "must be given, because a model needs it", cure)
    if sequence is None:
        rule = "must be given, because samples need a length"
        yield field_problem(("seq_length",), "--seq-length", None, rule, "Write --seq-length 1024")
    elif m.max_position_embeddings is None:
        if m.positions == "learned_absolute":
            cure = f"Write --max-position-embeddings {sequence}"
            rule = "must be given, because learned positions are a table of that length"
            yield field_problem(("max_position_embeddings",), "--max-position-embeddings", None, rule, cure)
    elif sequence > m.max_position_embeddings:
        rule = f"must be at most --max-position-embeddings, {m.max_position_embeddings}"
        cure = f"Write --max-position-embeddings {sequence}, or --seq-length {m.max_position_embeddings}"
        yield field_problem(("seq_length", "max_position_embeddings"), "--seq-length", sequence, rule, cure)
    yield from form_problems(config)
    yield from _samples(config)
    if m.architecture.checks:
        yield from m.architecture.find("checks")(config)
    p = config.precision
    if p.fp16 and p.bf16:
        rule = "excludes --bf16, because there is one compute format"
        yield field_problem(("fp16", "bf16"), "--fp16", Words("both"), rule, "Leave out one of the two")
    if p.min_loss_scale > p.initial_loss_scale:
        both = ("min_loss_scale", "initial_loss_scale")
        rule = f"must be at most --initial-loss-scale, {p.initial_loss_scale}"
        yield field_problem(both, "--min-loss-scale", p.min_loss_scale, rule, "Write a smaller one")
    if p.loss_scale is not None and not p.fp16:
        rule = "is for float16, the only format whose loss is scaled"
        yield field_problem(("loss_scale", "fp16"), "--loss-scale", p.loss_scale, rule, "Add --fp16, or leave it out")


def form_problems(config: RunConfig) -> Iterator[Problem]:
    """What of a model's shape and form alone cannot work together, wherever it comes from."""
    yield from _heads(config)
    yield from _attention(config)
    yield from _forms(config)


def _attention(config: RunConfig) -> Iterator[Problem]:
    """Windows, parallel branches, scaled rotary positions."""
    m = config.model
    for name, positions in (("rope_scaling_type", "rope"), ("scaled_alibi", "alibi")):
        if getattr(m, name) and m.positions != positions:
            cure = f"Write --position-embedding-type {positions}, or leave out {flag(name)}"
            both, rule = (name, "position_embedding_type"), f"is for {positions}, not {m.positions}"
            yield field_problem(both, flag(name), getattr(m, name), rule, cure)
    if m.rope_scaling_type == "llama3" and m.rope_high_freq_factor <= m.rope_low_freq_factor:
        both = ("rope_high_freq_factor", "rope_low_freq_factor")
        rule = f"must be more than --rope-low-freq-factor, {m.rope_low_freq_factor}"
        cure = "Write --rope-high-freq-factor 4"
        yield field_problem(both, "--rope-high-freq-factor", m.rope_high_freq_factor, rule, cure)
    if m.apply_layernorm_1p and m.norm != "rmsnorm_1p":
        both = ("apply_layernorm_1p", "normalization")
        cure = "Add --normalization RMSNorm, or leave it out"
        yield field_problem(both, "--apply-layernorm-1p", Words("it with LayerNorm"), "is for RMSNorm", cure)
    absent = [layer for layer in m.full_attention_layers if not 0 <= layer < (m.num_layers or layer + 1)]
    if absent:
        both, rule = ("full_attention_layers", "num_layers"), f"must be numbers of layers, from 0 to {m.num_layers - 1}"
        yield field_problem(both, "--full-attention-layers", absent, rule, "Leave these out")
    if m.full_attention_layers and m.sliding_window is None:
        both = ("full_attention_layers", "sliding_window")
        rule = "needs a --sliding-window, without which all layers see everything"
        cure = "Add --sliding-window N, or leave it out"
        yield field_problem(both, "--full-attention-layers", m.full_attention_layers, rule, cure)
    for name, other, wanted in (
        ("parallel_layernorm", "parallel_attn", True),
        ("parallel_attn", "apply_residual_connection_post_layernorm", False),
    ):
        if getattr(m, name) and getattr(m, other) != wanted:
            rule, found = f"needs {flag(other)}", Words("none")
            if not wanted:
                rule, found = f"excludes {flag(other)}", Words("both")
            cure = f"{'Add' if wanted else 'Leave out'} {flag(other)}, or leave out {flag(name)}"
            yield field_problem((name, other), flag(name), found, rule, cure)


def _heads(config: RunConfig) -> Iterator[Problem]:
    m = config.model
    hidden, heads = m.hidden_size, m.num_attention_heads
    if not hidden or not heads:
        return
    if m.kv_channels is None and hidden % heads:
        rule = f"must divide --hidden-size, {hidden}"
        cure = (
            f"Write --num-attention-heads {around(heads, divisors(hidden))}, "
            f"or --hidden-size {around(hidden, multiples(hidden, heads))}, "
            "or the width of a head with --kv-channels"
        )
        yield field_problem(("num_attention_heads", "hidden_size"), "--num-attention-heads", heads, rule, cure)
        return
    groups = m.num_query_groups
    if m.attention_head_type == "multiquery":
        if groups and groups != 1:
            both, rule = ("num_query_groups", "attention_head_type"), "must be 1 with --attention-head-type multiquery"
            yield field_problem(both, "--num-query-groups", groups, rule, "Leave out one of the two")
    elif m.group_query_attention and groups is None:
        rule, cure = "needs --num-query-groups", "Write --num-query-groups with the number of key/value heads"
        yield field_problem(("num_query_groups",), "--group-query-attention", Words("none"), rule, cure)
    elif groups and heads % groups:
        both, rule = ("num_query_groups", "num_attention_heads"), f"must divide --num-attention-heads, {heads}"
        cure = f"Write --num-query-groups {around(groups, divisors(heads))}"
        yield field_problem(both, "--num-query-groups", groups, rule, cure)
    if m.positions == "rope":
        rotated = int(m.head_dim * m.rotary_percent)
        if rotated < 2 or rotated % 2:  # of an odd number others rotate one channel more, at other angles
            rule = f"must be an even number, at least 2 (they are {m.head_dim} x --rotary-percent, rotated in pairs)"
            cure = "Write a larger --rotary-percent, or fewer --num-attention-heads"
            if rotated % 2 and rotated > 1:
                even = [n for n in (rotated - 1, rotated + 1) if n <= m.head_dim]
                fractions = [f"{math.ceil(n / m.head_dim * 1e6) / 1e6:g}" for n in even]
                cure = f"Write --rotary-percent {' or '.join(fractions)}"
            about = ("num_attention_heads", "hidden_size", "rotary_percent")
            yield field_problem(about, "The rotated channels of a head", rotated, rule, cure)


def _forms(config: RunConfig) -> Iterator[Problem]:
    m = config.model
    named = ("openai_gelu", "relu", "squared_relu", "swiglu", "glu_activation")
    chosen = [
        name
        for name in named
        if getattr(m, name) and not (name == "glu_activation" and m.swiglu and m.glu_activation == "swiglu")
    ]
    if len(chosen) > 1:
        cure, found = f"Keep one of {', '.join(map(flag, chosen))}", Words(" and ".join(map(flag, chosen)))
        yield field_problem(tuple(chosen), "The activation of an MLP", found, "must be named once", cure)
    if m.use_rotary_position_embeddings and m.position_embedding_type == "alibi":
        both = ("use_rotary_position_embeddings", "position_embedding_type")
        rule = "excludes --position-embedding-type alibi, because a model has one kind of positions"
        yield field_problem(both, "--use-rotary-position-embeddings", Words("both"), rule, "Leave out one of the two")


def _samples(config: RunConfig) -> Iterator[Problem]:
    """A vocabulary that samples cannot be made with."""
    d = config.data
    if d.dataset in ("bert", "t5") and d.tokenizer_type == "GPT2BPETokenizer":
        needed = f"{'[CLS], [SEP], [MASK] and ' * (d.dataset == 'bert')}padding"
        rule = f"must have tokens for {needed}, which samples of {d.dataset} need and GPT-2's lacks"
        cure = "Write --vocab-file vocab.txt (BERT's) without --merge-file, as the data was made"
        yield field_problem(("tokenizer_type",), "--tokenizer-type", d.tokenizer_type, rule, cure)
