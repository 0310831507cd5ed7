"""Rules of shape and formats."""

import pytest

from megalith.config.checks.model import model_problems
from megalith.config.run import RunConfig

GOOD = RunConfig().replace(
    num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32, max_position_embeddings=32
)


def texts(**values):
    return [problem.text for problem in model_problems(GOOD.replace(**values))]


CASES = [
    (
        {"num_attention_heads": 5},
        "--num-attention-heads must divide --hidden-size, 64; found 5. Write --num-attention-heads 4 or 8, or"
        " --hidden-size 60 or 65, or the width of a head with --kv-channels.",
    ),
    (
        {"num_query_groups": 3},
        "--num-query-groups must divide --num-attention-heads, 4; found 3. Write --num-query-groups 2 or 4.",
    ),
    ({"group_query_attention": True}, "Write --num-query-groups with the number of key/value heads"),
    (
        {"attention_head_type": "multiquery", "num_query_groups": 2},
        "--num-query-groups must be 1 with --attention-head-type multiquery; found 2. Leave out one of the two.",
    ),
    (
        {"seq_length": 64},
        "--seq-length must be at most --max-position-embeddings, 32; found 64. Write "
        "--max-position-embeddings 64, or --seq-length 32.",
    ),
    (
        {"seq_length": None},
        "--seq-length must be given, because samples need a length; found nothing. Write --seq-length 1024.",
    ),
    ({"max_position_embeddings": None}, "Write --max-position-embeddings 32"),
    (
        {"fp16": True, "bf16": True},
        "--fp16 excludes --bf16, because there is one compute format; found both. Leave out one of the two.",
    ),
    (
        {"loss_scale": 8.0},
        "--loss-scale is for float16, the only format whose loss is scaled; found 8.0. Add --fp16, or leave it out.",
    ),
    ({"fp16": True, "min_loss_scale": 2.0**40}, "--min-loss-scale"),
    (
        {"swiglu": True, "squared_relu": True},
        "The activation of an MLP must be named once; found --squared-relu and --swiglu. Keep one of "
        "--squared-relu, --swiglu.",
    ),
    ({"use_rotary_position_embeddings": True, "position_embedding_type": "alibi"}, "a model has one kind of positions"),
    (
        {"position_embedding_type": "rope", "rotary_percent": 0.01},
        "The rotated channels of a head must be an even number, at least 2 (they are 16 x --rotary-percent, "
        "rotated in pairs); found 0. Write a larger --rotary-percent, or fewer --num-attention-heads.",
    ),
    (
        {"position_embedding_type": "rope", "rotary_percent": 0.2},
        "The rotated channels of a head must be an even number, at least 2 (they are 16 x --rotary-percent, "
        "rotated in pairs); found 3. Write --rotary-percent 0.125 or 0.25.",
    ),
    (
        {"rope_scaling_type": "yarn"},
        "--rope-scaling-type is for rope, not learned_absolute; found 'yarn'. Write --position-embedding-type"
        " rope, or leave out --rope-scaling-type.",
    ),
    (
        {"scaled_alibi": True},
        "--scaled-alibi is for alibi, not learned_absolute; found True. Write --position-embedding-type "
        "alibi, or leave out --scaled-alibi.",
    ),
    (
        {"position_embedding_type": "rope", "rope_scaling_type": "llama3", "rope_high_freq_factor": 1.0},
        "--rope-high-freq-factor must be more than --rope-low-freq-factor, 1.0; found 1.0. Write "
        "--rope-high-freq-factor 4.",
    ),
    (
        {"sliding_window": 8, "full_attention_layers": [1, 4]},
        "--full-attention-layers must be numbers of layers, from 0 to 3; found [4]. Leave these out.",
    ),
    ({"full_attention_layers": [1]}, "Add --sliding-window N, or leave it out"),
    (
        {"apply_layernorm_1p": True},
        "--apply-layernorm-1p is for RMSNorm; found it with LayerNorm. Add --normalization RMSNorm, or leave it out.",
    ),
    (
        {"model_type": "bert", "scale_embeddings": True, "dataset": "bert", "loss": "bert"},
        "--scale-embeddings is for GPT alone; found it with bert. Leave it out, or train gpt.",
    ),
    (
        {"parallel_layernorm": True},
        "--parallel-layernorm needs --parallel-attn; found none. Add --parallel-attn, or leave out "
        "--parallel-layernorm.",
    ),
    (
        {"parallel_attn": True, "apply_residual_connection_post_layernorm": True},
        "--parallel-attn excludes --apply-residual-connection-post-layernorm; found both. Leave out "
        "--apply-residual-connection-post-layernorm, or leave out --parallel-attn.",
    ),
]


@pytest.mark.parametrize(
    ("values", "message"), CASES, ids=lambda each: "-".join(each) if isinstance(each, dict) else ""
)
def test_each_rule(values, message):
    (text,) = texts(**values)
    assert message in text


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"num_attention_heads": 5, "kv_channels": 8},
        {"position_embedding_type": "alibi", "max_position_embeddings": None},
        {"swiglu": True, "glu_activation": "swiglu"},
        {"group_query_attention": True, "num_query_groups": 2},
        {"num_query_groups": 1},
        {"position_embedding_type": "rotary", "use_rotary_position_embeddings": True},
        {"attention_head_type": "multiquery"},
        {"sliding_window": 8, "full_attention_layers": [0, 3]},
        {"parallel_attn": True, "parallel_layernorm": True},
        {"position_embedding_type": "rope", "rope_scaling_type": "llama3"},
        {"position_embedding_type": "alibi", "scaled_alibi": True},
        {"fp16": True, "loss_scale": 8.0},
        {"num_layers": None, "use_checkpoint_args": True, "load": "a"},
    ],
    ids=lambda each: "-".join(each),
)
def test_what_is_allowed(values):
    assert texts(**values) == []


BERT = {"model_type": "bert", "dataset": "bert", "loss": "bert"}
BERT_CASES = [
    (
        {"norm_after_residual": True},
        "--norm-after-residual is for BERT alone; found it with gpt. Leave it out, or train bert.",
    ),
    (
        {"bert_no_binary_head": True},
        "--bert-no-binary-head is for BERT alone; found it with gpt. Leave it out, or train bert.",
    ),
    ({"dataset": "bert"}, "--dataset must be 'gpt' for gpt; found 'bert'. Leave it out, or train bert."),
    ({"loss": "t5"}, "--loss must be 'lm' for gpt; found 't5'. Leave it out, or train t5."),
    ({"loss": "classification"}, "--loss must be 'lm' for gpt; found 'classification'. Leave it out."),
    ({"dataset": "ict"}, "--dataset must be 'gpt' for gpt; found 'ict'. Leave it out, or train ict."),
    (
        {**BERT, "tokenizer_type": "GPT2BPETokenizer"},
        "--tokenizer-type must have tokens for [CLS], [SEP], [MASK] and padding, which samples of bert need "
        "and GPT-2's lacks; found 'GPT2BPETokenizer'. Write --vocab-file vocab.txt (BERT's) without "
        "--merge-file, as the data was made.",
    ),
    (
        {**BERT, "position_embedding_type": "rope"},
        "--position-embedding-type must be learned_absolute for BERT, which learns its positions; found "
        "'rope'. Leave it out; the default is learned_absolute.",
    ),
    ({**BERT, "norm_after_residual": True, "apply_residual_connection_post_layernorm": True}, "a layer has one form"),
    (
        {**BERT, "dataset": "gpt"},
        "--dataset must be 'bert' for bert; found 'gpt'. Write --dataset bert, or leave it out.",
    ),
    ({**BERT, "loss": "lm"}, "Write --loss bert, or leave it out."),
    (
        {**BERT, "reset_attention_mask": True},
        "--reset-attention-mask has no meaning for BERT, whose samples are of one document each; found True. "
        "Leave it out.",
    ),
    (
        {**BERT, "seq_length": 4},
        "--seq-length must be at least 8, because a sample has [CLS], two segments and a [SEP] after each; "
        "found 4. Write --seq-length 512.",
    ),
]


@pytest.mark.parametrize(("values", "message"), BERT_CASES, ids=range(len(BERT_CASES)))
def test_each_rule_of_bert(values, message):
    (text,) = texts(**values)
    assert message in text


@pytest.mark.parametrize(
    "values", [BERT, {**BERT, "norm_after_residual": True, "bert_no_binary_head": True}, {**BERT, "dataset": "my:own"}]
)
def test_what_bert_may_be(values):
    assert texts(**values) == []
