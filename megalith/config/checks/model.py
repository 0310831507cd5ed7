"""Rules of the model's shape and number formats."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megalith.config.flags.text import Problem, Words, around, divisors, flag, multiples, trouble
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
            yield trouble((name,), flag(name), None, "a model needs it", cure)
    if sequence is None:
        yield trouble(("seq_length",), "--seq-length", None, "samples need a length", "Write --seq-length 1024")
    elif m.max_position_embeddings is None:
        if m.positions == "learned_absolute":
            cure = f"Write --max-position-embeddings {sequence}"
            yield trouble(
                ("max_position_embeddings",),
                "--max-position-embeddings",
                None,
                "learned positions are a table of that length",
                cure,
            )
    elif sequence > m.max_position_embeddings:
        rule = f"it is at most --max-position-embeddings, {m.max_position_embeddings}"
        cure = f"Write --max-position-embeddings {sequence}, or --seq-length {m.max_position_embeddings}"
        yield trouble(("seq_length", "max_position_embeddings"), "--seq-length", sequence, rule, cure)
    yield from form_problems(config)
    yield from _samples(config)
    if m.architecture.checks:
        yield from m.architecture.find("checks")(config)
    p = config.precision
    if p.fp16 and p.bf16:
        yield trouble(
            ("fp16", "bf16"), "--fp16", Words("also --bf16"), "there is one compute format", "Leave out one of the two"
        )
    if p.min_loss_scale > p.initial_loss_scale:
        rule = f"it is at most --initial-loss-scale, {p.initial_loss_scale}"
        yield trouble(
            ("min_loss_scale", "initial_loss_scale"), "--min-loss-scale", p.min_loss_scale, rule, "Write a smaller one"
        )
    if p.loss_scale is not None and not p.fp16:
        yield trouble(
            ("loss_scale", "fp16"),
            "--loss-scale",
            p.loss_scale,
            "only float16 is scaled",
            "Add --fp16, or leave it out",
        )


def form_problems(config: RunConfig) -> Iterator[Problem]:
    """What of a model's shape and form alone cannot work together, wherever it comes from."""
    yield from _heads(config)
    yield from _attention(config)
    yield from _forms(config)


def _attention(config: RunConfig) -> Iterator[Problem]:
    """Windows, parallel branches, stretched positions."""
    m = config.model
    of = {"rope_scaling_type": "rope", "scaled_alibi": "alibi"}
    for name, positions in of.items():
        if getattr(m, name) and m.positions != positions:
            cure = f"Write --position-embedding-type {positions}, or leave out {flag(name)}"
            yield trouble(
                (name, "position_embedding_type"),
                flag(name),
                getattr(m, name),
                f"it is for {positions}, not {m.positions}",
                cure,
            )
    if m.rope_scaling_type == "llama3" and m.rope_high_freq_factor <= m.rope_low_freq_factor:
        both = ("rope_high_freq_factor", "rope_low_freq_factor")
        rule = f"it is more than --rope-low-freq-factor, {m.rope_low_freq_factor}"
        yield trouble(both, "--rope-high-freq-factor", m.rope_high_freq_factor, rule, "Write --rope-high-freq-factor 4")
    if m.apply_layernorm_1p and m.norm != "rmsnorm_1p":
        both = ("apply_layernorm_1p", "normalization")
        yield trouble(
            both,
            "--apply-layernorm-1p",
            Words("with LayerNorm"),
            "it is for RMSNorm",
            "Add --normalization RMSNorm, or leave it out",
        )
    strange = [layer for layer in m.full_attention_layers if not 0 <= layer < (m.num_layers or layer + 1)]
    if strange:
        rule = f"layers are counted from 0 to {m.num_layers - 1}"
        yield trouble(
            ("full_attention_layers", "num_layers"), "--full-attention-layers", strange, rule, "Leave these out"
        )
    if m.full_attention_layers and m.sliding_window is None:
        both = ("full_attention_layers", "sliding_window")
        rule = "all layers see everything without a window"
        yield trouble(
            both, "--full-attention-layers", m.full_attention_layers, rule, "Add --sliding-window N, or leave it out"
        )
    for name, other, wanted in (
        ("parallel_layernorm", "parallel_attn", True),
        ("parallel_attn", "apply_residual_connection_post_layernorm", False),
    ):
        if getattr(m, name) and getattr(m, other) != wanted:
            rule = f"it goes {'with' if wanted else 'without'} {flag(other)}"
            yield trouble(
                (name, other),
                flag(name),
                True,
                rule,
                f"{'Add' if wanted else 'Leave out'} {flag(other)}, or leave out {flag(name)}",
            )


def _heads(config: RunConfig) -> Iterator[Problem]:
    m = config.model
    hidden, heads = m.hidden_size, m.num_attention_heads
    if not hidden or not heads:
        return
    if m.kv_channels is None and hidden % heads:
        rule = f"--hidden-size, {hidden}, must be a multiple of it"
        cure = (
            f"Write --num-attention-heads {around(heads, divisors(hidden))}, or --hidden-size {around(hidden, multiples(hidden, heads))}, "
            "or the width of a head with --kv-channels"
        )
        yield trouble(("num_attention_heads", "hidden_size"), "--num-attention-heads", heads, rule, cure)
        return
    groups = m.num_query_groups
    if m.attention_head_type == "multiquery":
        if groups and groups != 1:
            rule = "--attention-head-type multiquery is one group"
            yield trouble(
                ("num_query_groups", "attention_head_type"),
                "--num-query-groups",
                groups,
                rule,
                "Leave out one of the two",
            )
    elif m.group_query_attention and groups is None:
        cure = "Write --num-query-groups with the number of key/value heads"
        yield trouble(
            ("num_query_groups",),
            "--group-query-attention",
            Words("no --num-query-groups"),
            "it needs to know how many groups",
            cure,
        )
    elif groups and heads % groups:
        rule = f"--num-attention-heads, {heads}, must be a multiple of it"
        yield trouble(("num_query_groups", "num_attention_heads"), "--num-query-groups", groups, rule,
                      f"Write --num-query-groups {around(groups, divisors(heads))}")  # fmt: skip
    if m.positions == "rope":
        rotated = int(m.head_dim * m.rotary_percent)
        if rotated < 2 or rotated % 2:  # of an odd number others rotate one channel more, at other angles
            rule = f"channels are rotated in pairs, and a head has {m.head_dim} x --rotary-percent of them"
            cure = "Write a larger --rotary-percent, or fewer --num-attention-heads"
            if rotated % 2 and rotated > 1:
                rule += ", which is odd"
                shares = [
                    f"{math.ceil(n / m.head_dim * 1e6) / 1e6:g}" for n in (rotated - 1, rotated + 1) if n <= m.head_dim
                ]
                cure = f"Write --rotary-percent {' or '.join(shares)}"
            yield trouble(
                ("num_attention_heads", "hidden_size", "rotary_percent"),
                "rotated channels of a head",
                rotated,
                rule,
                cure,
            )


def _forms(config: RunConfig) -> Iterator[Problem]:
    m = config.model
    named = ("openai_gelu", "relu", "squared_relu", "swiglu", "glu_activation")
    chosen = [
        name
        for name in named
        if getattr(m, name) and not (name == "glu_activation" and m.swiglu and m.glu_activation == "swiglu")
    ]
    if len(chosen) > 1:
        cure = f"Keep one of {', '.join(map(flag, chosen))}"
        yield trouble(tuple(chosen), "activation", Words(" and ".join(map(flag, chosen))), "an MLP has one", cure)
    if m.use_rotary_position_embeddings and m.position_embedding_type == "alibi":
        both = ("use_rotary_position_embeddings", "position_embedding_type")
        yield trouble(
            both,
            "--use-rotary-position-embeddings",
            Words("also alibi"),
            "a model has one kind of positions",
            "Leave out one of the two",
        )


def _samples(config: RunConfig) -> Iterator[Problem]:
    """A vocabulary that samples cannot be made with."""
    d = config.data
    if d.dataset in ("bert", "t5") and d.tokenizer_type == "GPT2BPETokenizer":
        rule = f"samples of {d.dataset} have tokens for {'[CLS], [SEP], [MASK] and ' * (d.dataset == 'bert')}padding, which GPT-2's lacks"
        cure = "Write --vocab-file vocab.txt (BERT's) without --merge-file, as the data was made"
        yield trouble(("tokenizer_type",), "--tokenizer-type", d.tokenizer_type, rule, cure)
