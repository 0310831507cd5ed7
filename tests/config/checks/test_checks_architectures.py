"""Rules of T5, each with its cure; and a config without fault has none."""

import pytest

from megalith.config.checks.checks import find_problems
from megalith.config.checks.masking import masking_notices
from megalith.config.run import RunConfig

T5 = RunConfig().replace(
    model_type="t5",
    dataset="t5",
    loss="t5",
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    seq_length=32,
    decoder_seq_length=16,
    max_position_embeddings=32,
    micro_batch_size=2,
    global_batch_size=8,
    train_iters=10,
    lr=1e-3,
    data_path=["a"],
    tokenizer_type="BertWordPieceLowerCase",
    vocab_file="v",
    vocab_extra_ids=100,
)
RELATIVE = {"position_embedding_type": "relative"}


def texts(processes=1, **values):
    return [problem.text for problem in find_problems(T5.replace(**values), processes)]


@pytest.mark.parametrize(
    "form", [{}, RELATIVE, {"position_embedding_type": "none"}, {"decoder_num_layers": 2, "decoder_seq_length": None}]
)
def test_nothing_wrong(form):
    assert texts(**form) == []
    assert texts(8, tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=4, **form) == []
    assert texts(8, tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=4, **form) == []


CASES = [
    ({"position_embedding_type": "rope"}, "Write --position-embedding-type relative, or leave it out"),
    ({**RELATIVE, "relative_attention_max_distance": 16}, "Write --relative-attention-max-distance 64."),
    (
        {"decoder_seq_length": 48},
        "--decoder-seq-length must be at most --max-position-embeddings, 32; found 48. Write "
        "--max-position-embeddings 48, or --decoder-seq-length 32.",
    ),
    (
        {"vocab_extra_ids": 0},
        "--vocab-extra-ids must be above 0 for T5, which marks masked spans with sentinels that the "
        "vocabulary lacks; found 0. Write --vocab-extra-ids 100.",
    ),
    ({"dataset": "gpt"}, "--dataset must be 't5' for t5; found 'gpt'. Write --dataset t5, or leave it out."),
    ({"loss": "lm"}, "Write --loss t5"),
    (
        {"eod_mask_loss": True},
        "--eod-mask-loss has no meaning for T5, whose samples are of one document each; found True. Leave it out.",
    ),
    ({"sliding_window": 8}, "--sliding-window is for GPT alone; found it with t5. Leave it out, or train gpt."),
    (
        {"norm_after_residual": True},
        "--norm-after-residual is for BERT alone; found it with t5. Leave it out, or train bert.",
    ),
    (
        {"model_type": "gpt", "dataset": "gpt", "loss": "lm", "decoder_num_layers": 2},
        "--decoder-num-layers is for T5 alone; found it with gpt. Leave it out, or train t5.",
    ),
    (
        {"model_type": "gpt", "dataset": "gpt", "loss": "lm", **RELATIVE},
        "--position-embedding-type relative is a bias that T5 alone has; found it with gpt. Leave it out, or "
        "write --position-embedding-type alibi.",
    ),
    (
        {"decoder_seq_length": 5},
        "--decoder-seq-length must be at least 6: of 30 tokens up to 4 are masked, which with sentinels and "
        "the end are usually 6, at most 9; found 5. Write 9, or at least 6, or lower --mask-prob.",
    ),
    (
        {"mask_prob": 0.03},
        "--mask-prob must mask at least one of the 30 tokens of text in a sample; found 0.03. Raise it (the "
        "usual value is 0.15), or --seq-length.",
    ),
    (
        {"mask_prob": 0.9},
        "--decoder-seq-length must be at least 35: of 30 tokens up to 27 are masked, which with sentinels and"
        " the end are usually 35, at most 55; found 16. Write 55, or at least 35, or lower --mask-prob.",
    ),
    (
        {"relu": True, "swiglu": True},
        "The activation of an MLP must be named once; found --relu and --swiglu. Keep one of --relu, --swiglu.",
    ),
]


@pytest.mark.parametrize(
    ("values", "message"), CASES, ids=lambda each: "-".join(each) if isinstance(each, dict) else ""
)
def test_each_rule(values, message):
    (text,) = texts(**values)
    assert message in text


LAYOUTS = [
    (
        2,
        {"context_parallel_size": 2, "decoder_seq_length": 14},
        "--decoder-seq-length must be a multiple of 4, because each of 2 context-parallel processes takes two"
        " chunks of it; found 14. Write --decoder-seq-length 12 or 16.",
    ),
    (
        2,
        {"context_parallel_size": 2, "seq_length": 30},
        "--seq-length (the encoder's, --encoder-seq-length) must be a multiple of 4, because each of 2 "
        "context-parallel processes takes two chunks of it; found 30. Write --seq-length 28 or 32.",
    ),
    (2, {"context_parallel_size": 2, "seq_length": 30, "decoder_seq_length": None}, "Write --seq-length 28 or 32."),
    (
        6,
        {
            "tensor_model_parallel_size": 3,
            "context_parallel_size": 2,
            "sequence_parallel": True,
            "num_attention_heads": 6,
            "ffn_hidden_size": 96,
            "kv_channels": 8,
            "seq_length": 24,
        },
        "Write --decoder-seq-length 12 or 24.",
    ),
    (
        4,
        {"tensor_model_parallel_size": 4, "sequence_parallel": True, "decoder_seq_length": 18},
        "Write --decoder-seq-length 16 or 20.",
    ),
    (
        16,
        {"pipeline_model_parallel_size": 16, "global_batch_size": 32},
        "--pipeline-model-parallel-size must be at most the number of encoder and decoder layers, 8, because "
        "each stage has a layer; found 16. Write 8 or less.",
    ),
    (
        4,
        {"pipeline_model_parallel_size": 4, "num_layers_per_virtual_pipeline_stage": 3},
        "--num-layers-per-virtual-pipeline-stage times the 4 pipeline stages must divide the number of "
        "encoder and decoder layers, 8; found 3. Write 1 or 2.",
    ),
]


def test_both_lengths_are_reported():
    first, second = texts(2, context_parallel_size=2, seq_length=30, decoder_seq_length=18)
    assert "Write --seq-length 28 or 32." in first and "Write --decoder-seq-length 16 or 20." in second


@pytest.mark.parametrize(("processes", "values", "message"), LAYOUTS)
def test_each_rule_of_layouts(processes, values, message):
    (text,) = texts(processes, **values)
    assert message in text


def test_what_rare_samples_lose_is_reported():
    assert masking_notices(T5) == []
    tight = T5.replace(decoder_seq_length=6, vocab_extra_ids=3)
    assert [line.partition(" fits")[0] for line in masking_notices(tight)] == [
        "--decoder-seq-length 6",
        "--vocab-extra-ids 3",
    ]
    assert "(at most 9) is masked less" in masking_notices(tight)[0]
