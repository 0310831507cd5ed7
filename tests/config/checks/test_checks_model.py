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
    ({"num_attention_heads": 5},
     "--num-attention-heads: found 5; --hidden-size, 64, must be a multiple of it. Write --num-attention-heads 4 or 8, "
     "or --hidden-size 60 or 65, or the width of a head with --kv-channels."),
    ({"num_query_groups": 3},
     "--num-query-groups: found 3; --num-attention-heads, 4, must be a multiple of it. Write --num-query-groups 2 or 4."),
    ({"group_query_attention": True}, "Write --num-query-groups with the number of key/value heads"),
    ({"attention_head_type": "multiquery", "num_query_groups": 2}, "--attention-head-type multiquery is one group"),
    ({"seq_length": 64},
     "--seq-length: found 64; it is at most --max-position-embeddings, 32. Write --max-position-embeddings 64, or --seq-length 32."),
    ({"seq_length": None}, "--seq-length: found nothing"),
    ({"max_position_embeddings": None}, "Write --max-position-embeddings 32"),
    ({"fp16": True, "bf16": True}, "--fp16: found also --bf16; there is one compute format. Leave out one of the two."),
    ({"loss_scale": 8.0}, "only float16 is scaled"),
    ({"fp16": True, "min_loss_scale": 2.0**40}, "--min-loss-scale"),
    ({"swiglu": True, "squared_relu": True}, "activation: found --squared-relu and --swiglu; an MLP has one."),
    ({"use_rotary_position_embeddings": True, "position_embedding_type": "alibi"}, "a model has one kind of positions"),
    ({"position_embedding_type": "rope", "rotary_percent": 0.01}, "rotated channels of a head: found 0"),
    ({"position_embedding_type": "rope", "rotary_percent": 0.2}, "found 3; channels are rotated in pairs, and a head has 16 x "
     "--rotary-percent of them, which is odd. Write --rotary-percent 0.125 or 0.25."),
    ({"rope_scaling_type": "yarn"},
     "--rope-scaling-type: found 'yarn'; it is for rope, not learned_absolute. Write --position-embedding-type rope, or leave out "
     "--rope-scaling-type."),
    ({"scaled_alibi": True}, "--scaled-alibi: found True; it is for alibi"),
    ({"position_embedding_type": "rope", "rope_scaling_type": "llama3", "rope_high_freq_factor": 1.0}, "it is more than --rope-low-freq-"),
    ({"sliding_window": 8, "full_attention_layers": [1, 4]}, "--full-attention-layers: found [4]; layers are counted from 0 to 3."),
    ({"full_attention_layers": [1]}, "Add --sliding-window N, or leave it out"),
    ({"apply_layernorm_1p": True}, "--apply-layernorm-1p: found with LayerNorm; it is for RMSNorm. Add --normalization RMSNorm"),
    (
        {"model_type": "bert", "scale_embeddings": True, "dataset": "bert", "loss": "bert"},
        "--scale-embeddings: found with bert; it is a form of GPT",
    ),
    ({"parallel_layernorm": True}, "--parallel-layernorm: found True; it goes with --parallel-attn. Add --parallel-attn, or leave out"),
    ({"parallel_attn": True, "apply_residual_connection_post_layernorm": True}, "it goes without --apply-residual-connection-post-"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"), CASES, ids=lambda each: "-".join(each) if isinstance(each, dict) else ""
)
def test_each_rule(values, message):
    (text,) = texts(**values)
    assert message in text


@pytest.mark.parametrize(
    "values",
    [
        {}, {"num_attention_heads": 5, "kv_channels": 8}, {"position_embedding_type": "alibi", "max_position_embeddings": None},
        {"swiglu": True, "glu_activation": "swiglu"}, {"group_query_attention": True, "num_query_groups": 2}, {"num_query_groups": 1},
        {"position_embedding_type": "rotary", "use_rotary_position_embeddings": True}, {"attention_head_type": "multiquery"},
        {"sliding_window": 8, "full_attention_layers": [0, 3]}, {"parallel_attn": True, "parallel_layernorm": True},
        {"position_embedding_type": "rope", "rope_scaling_type": "llama3"}, {"position_embedding_type": "alibi", "scaled_alibi": True},
        {"fp16": True, "loss_scale": 8.0}, {"num_layers": None, "use_checkpoint_args": True, "load": "a"},
    ],
    ids=lambda each: "-".join(each),
)  # fmt: skip
def test_what_is_allowed(values):
    assert texts(**values) == []


BERT = {"model_type": "bert", "dataset": "bert", "loss": "bert"}
BERT_CASES = [
    (
        {"norm_after_residual": True},
        "--norm-after-residual: found with gpt; it is a form of BERT. Leave it out, or train bert.",
    ),
    ({"bert_no_binary_head": True}, "--bert-no-binary-head: found with gpt"),
    ({"dataset": "bert"}, "--dataset: found 'bert'; gpt learns from the dataset 'gpt'. Leave it out, or train bert."),
    ({"loss": "t5"}, "--loss: found 't5'; gpt learns from the loss 'lm'. Leave it out, or train t5."),
    ({"loss": "classification"}, "gpt learns from the loss 'lm'. Leave it out."),
    ({"dataset": "ict"}, "gpt learns from the dataset 'gpt'. Leave it out."),
    (
        {**BERT, "tokenizer_type": "GPT2BPETokenizer"},
        "samples of bert have tokens for [CLS], [SEP], [MASK] and padding, which GPT-2's lacks. Write --vocab-file vocab.txt (BERT's)",
    ),
    (
        {**BERT, "position_embedding_type": "rope"},
        "--position-embedding-type: found 'rope'; BERT learns its positions.",
    ),
    ({**BERT, "norm_after_residual": True, "apply_residual_connection_post_layernorm": True}, "a layer has one form"),
    (
        {**BERT, "dataset": "gpt"},
        "--dataset: found 'gpt'; bert learns from the dataset 'bert'. Write --dataset bert, or leave it out.",
    ),
    ({**BERT, "loss": "lm"}, "Write --loss bert, or leave it out."),
    ({**BERT, "reset_attention_mask": True}, "samples of BERT are of one document each"),
    ({**BERT, "seq_length": 4}, "it is at least 8"),
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
