"""Rules of T5, each with its cure; and a config without fault has none."""

import pytest

from megalith.config.checks.checks import find_problems
from megalith.config.checks.masking import masking_notices
from megalith.config.run import RunConfig

T5 = RunConfig().replace(
    model_type="t5", dataset="t5", loss="t5", num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32, decoder_seq_length=16,
    max_position_embeddings=32, micro_batch_size=2, global_batch_size=8, train_iters=10, lr=1e-3, data_path=["a"],
    tokenizer_type="BertWordPieceLowerCase", vocab_file="v", vocab_extra_ids=100,
)  # fmt: skip
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
    ({"decoder_seq_length": 48}, "--decoder-seq-length: found 48; it is at most --max-position-embeddings, 32."),
    ({"vocab_extra_ids": 0}, "the vocabulary lacks. Write --vocab-extra-ids 100."),
    ({"dataset": "gpt"}, "--dataset: found 'gpt'; t5 learns from the dataset 't5'. Write --dataset t5, or leave it out."),
    ({"loss": "lm"}, "Write --loss t5"),
    ({"eod_mask_loss": True}, "samples of T5 are of one document each"),
    ({"sliding_window": 8}, "it is a form of GPT"),
    ({"norm_after_residual": True}, "--norm-after-residual: found with t5; it is a form of BERT"),
    ({"model_type": "gpt", "dataset": "gpt", "loss": "lm", "decoder_num_layers": 2}, "found with gpt; T5 alone has it"),
    ({"model_type": "gpt", "dataset": "gpt", "loss": "lm", **RELATIVE}, "found with gpt; T5 alone has a bias of that kind"),
    ({"decoder_seq_length": 5}, "up to 4 are masked, which with sentinels and the end are usually 6, at most 9. Write 9, or at least 6"),
    ({"mask_prob": 0.03}, "--mask-prob: found 0.03; of the 30 tokens of text in a sample it is less than one, so nothing is ever masked"),
    ({"mask_prob": 0.9}, "--decoder-seq-length: found 16; of 30 tokens up to 27 are masked"),
    ({"relu": True, "swiglu": True}, "activation: found --relu and --swiglu; an MLP has one."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"), CASES, ids=lambda each: "-".join(each) if isinstance(each, dict) else ""
)
def test_each_rule(values, message):
    (text,) = texts(**values)
    assert message in text


LAYOUTS = [
    (2, {"context_parallel_size": 2, "decoder_seq_length": 14},
     "--decoder-seq-length: found 14; each of 2 context-parallel processes takes two chunks of it. Write --decoder-seq-length 12 or 16."),
    (2, {"context_parallel_size": 2, "seq_length": 30},
     "--seq-length, the encoder's --encoder-seq-length: found 30; each of 2 context-parallel processes takes two chunks of it. "
     "Write --seq-length 28 or 32."),
    (2, {"context_parallel_size": 2, "seq_length": 30, "decoder_seq_length": None}, "Write --seq-length 28 or 32."),
    (6, {"tensor_model_parallel_size": 3, "context_parallel_size": 2, "sequence_parallel": True, "num_attention_heads": 6,
         "ffn_hidden_size": 96, "kv_channels": 8, "seq_length": 24}, "Write --decoder-seq-length 12 or 24."),
    (4, {"tensor_model_parallel_size": 4, "sequence_parallel": True, "decoder_seq_length": 18}, "Write --decoder-seq-length 16 or 20."),
    (16, {"pipeline_model_parallel_size": 16, "global_batch_size": 32},
     "found 16; each stage has a layer, and encoder and decoder layers is 8. Write 8 or less."),
    (4, {"pipeline_model_parallel_size": 4, "num_layers_per_virtual_pipeline_stage": 3}, "decoder layers, 8, must be a multiple of it"),
]  # fmt: skip


def test_both_lengths_are_told():
    first, second = texts(2, context_parallel_size=2, seq_length=30, decoder_seq_length=18)
    assert "Write --seq-length 28 or 32." in first and "Write --decoder-seq-length 16 or 20." in second


@pytest.mark.parametrize(("processes", "values", "message"), LAYOUTS)
def test_each_rule_of_layouts(processes, values, message):
    (text,) = texts(processes, **values)
    assert message in text


def test_what_rare_samples_lose_is_told():
    assert masking_notices(T5) == []
    tight = T5.replace(decoder_seq_length=6, vocab_extra_ids=3)
    assert [line.partition(" fits")[0] for line in masking_notices(tight)] == [
        "--decoder-seq-length 6",
        "--vocab-extra-ids 3",
    ]
    assert "(at most 9) is masked less" in masking_notices(tight)[0]
