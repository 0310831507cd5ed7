"""Flags that would make a checkpoint fit, for every parameter of real models and every size that decides it."""

import pytest

from megalith.checkpoint.store import fit
from megalith.config.flags.loading import to_yaml
from megalith.config.parameters import parameter_shapes
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig

BASE = {
    "num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 32,
    "ffn_hidden_size": 40,
}  # fmt: skip


BERT = {"model_type": "bert"}


def shapes(**model):
    config = RunConfig(model=ModelConfig(**{**BASE, **model}))
    return {f"model/{name}": list(shape) for name, shape in parameter_shapes(config.model).items()}


def model(**values):
    lines = [
        f"  {name}: {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in {**BASE, **values}.items()
    ]
    return fit.model_section("\n".join(["model:", *lines]))


def test_more_sentinels_than_the_checkpoint_has():
    """--vocab-size alone would be refused: the tokenizer has more tokens than that."""
    stored = to_yaml(RunConfig(model=ModelConfig(**BASE)).replace(vocab_extra_ids=20))
    lines = fit.differences(shapes(vocab_size=51), shapes(), fit.model_section(stored))
    assert lines and all("--vocab-extra-ids 20 --vocab-size 50" in line for line in lines)


CASES = [
    ({}, {"hidden_size": 48}, {"--hidden-size 24"}),
    ({}, {"vocab_size": 60}, {"--vocab-size 50"}),
    ({}, {"max_position_embeddings": 64}, {"--max-position-embeddings 32"}),
    ({}, {"ffn_hidden_size": 80}, {"--ffn-hidden-size 40"}),
    ({}, {"num_query_groups": 2, "group_query_attention": True}, {"--num-query-groups 4"}),
    ({"num_query_groups": 2, "group_query_attention": True}, {}, {"--num-query-groups 2"}),
    ({"kv_channels": 8}, {}, {"--num-attention-heads 4", "--num-query-groups 4"}),
    ({}, {"num_layers": 3}, {"--num-layers 2"}),
    ({"num_layers": 3}, {}, {"--num-layers 3"}),
    ({}, {"position_embedding_type": "rope"}, {"--position-embedding-type learned_absolute"}),
    ({"position_embedding_type": "rope"}, {}, {"--position-embedding-type rope"}),
    ({}, {"untie_embeddings_and_output_weights": True}, {"no --untie-embeddings-and-output-weights"}),
    ({"untie_embeddings_and_output_weights": True}, {}, {"--untie-embeddings-and-output-weights"}),
    ({"swiglu": True}, {}, {"--swiglu"}),
    ({"normalization": "RMSNorm"}, {}, {"--normalization rmsnorm"}),
    ({"qk_layernorm": True}, {}, {"--qk-layernorm"}),
    ({"add_bias_linear": False}, {}, {"--disable-bias-linear"}),
    (BERT, {**BERT, "vocab_size": 60}, {"--vocab-size 50"}),
    (BERT, {**BERT, "hidden_size": 48}, {"--hidden-size 24"}),
    (BERT, {**BERT, "bert_no_binary_head": True}, {"no --bert-no-binary-head"}),
    ({**BERT, "bert_no_binary_head": True}, BERT, {"--bert-no-binary-head"}),
    ({**BERT, "norm_after_residual": True}, BERT, {"--norm-after-residual", "--normalization layernorm"}),
    (
        BERT,
        {**BERT, "bert_no_binary_head": True, "max_position_embeddings": 64},
        {"no --bert-no-binary-head", "--max-position-embeddings 32"},
    ),
    (BERT, {}, {"--model-type bert", "no --bert-no-binary-head"}),
]


@pytest.mark.parametrize(("saved", "asked", "cures"), CASES, ids=str)
def test_every_difference_names_its_flag(saved, asked, cures):
    lines = fit.differences(shapes(**asked), shapes(**saved), model(**saved))
    found = {cure for line in lines for cure in line.partition(" -> ")[2].split(", ")}
    assert lines and found <= cures and found, (found, lines)


def test_no_difference():
    assert fit.differences(shapes(), shapes(), model()) == []


def test_without_a_config_the_shapes_still_tell():
    assert fit.model_section("") == fit.model_section("a: [") == fit.model_section("model: 3") == {}
    (line,) = fit.differences({"model/a": [32000, 4096]}, {"model/a": [32000, 2048]}, {})
    assert line == "model/a: the checkpoint has [32000, 2048], asked for is [32000, 4096]"
    assert len(fit.differences({"model/layers.0.b": [1]}, {"model/c": [1]}, {})) == 2


def test_only_parts_asked_for_count():
    found = {"model/a": [1], "optimizer/step/a": []}
    assert fit.differences({"model/a": [1]}, found, {}) == []
    assert fit.differences({"model/b": [1]}, found, {}, strict=False) == []


def test_a_part_that_is_not_there_is_one_line_without_advice():
    """An optimizer's state that the other optimizer did not have is the fault of no parameter's flag."""
    found = {"model/final_norm.bias": [1], "optimizer/exp_avg/final_norm.bias": [1]}
    asked = {
        "model/final_norm.bias": [1],
        "optimizer/momentum_buffer/final_norm.bias": [1],
        "optimizer/momentum_buffer/head.weight": [1],
    }
    (line,) = fit.differences(asked, found, {"normalization": "layernorm"})
    assert (
        line == "optimizer/momentum_buffer: asked for, the checkpoint has no such part, only model, optimizer/exp_avg"
    )


def test_long_reports_are_cut(tmp_path):
    text = fit.report(tmp_path, [f"line {number}" for number in range(50)])
    assert "line 19\n" in text and "line 20" not in text and "and 30 more" in text


def test_configs_compared():
    assert fit.config_differences(model(), model(num_layers=3)) == [("num_layers", 2, 3)]
    assert fit.config_differences(model(), model(position_embedding_type="absolute", normalization="layernorm")) == []
    assert (
        fit.as_flag("swiglu", True) == "--swiglu" and fit.as_flag("add_bias_linear", False) == "--disable-bias-linear"
    )


T5 = fit.model_section(to_yaml(RunConfig().replace(
    model_type="t5", num_layers=2, decoder_num_layers=3, hidden_size=32, num_attention_heads=4, vocab_size=64,
    position_embedding_type="relative", relative_attention_num_buckets=16,
)))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "cures"),
    [
        ("model/layers.3.cross_attention.q.weight", ["--model-type t5", "--decoder-num-layers 3", "--num-layers 2"]),
        ("model/layers.4.mlp.up.weight", ["--num-layers 2", "--decoder-num-layers 3"]),
        ("model/encoder_bias.weight", ["--position-embedding-type relative"]),
    ],
)
def test_what_only_t5_has(name, cures):
    others = [f"model/layers.{number}.mlp_norm.weight" for number in range(4)]
    assert fit.cure_of_presence(name, others, T5) == cures
    assert fit.cure_of_shape("model/decoder_bias.weight", [16, 4], [32, 4], T5) == [
        "--relative-attention-num-buckets 16"
    ]


def test_the_vocabulary_size_to_type_is_that_of_the_tokenizer() -> None:
    """NullTokenizer has a row more than --vocab-size says; where the run may have one, both sizes are named."""
    shape = {"model_type": "gpt", "vocab_size": 100, "hidden_size": 8}
    for tokenizer, asked, expected in (
        ("NullTokenizer", 121, "--vocab-size 99"),
        ("GPT2BPETokenizer", 121, "--vocab-size 100"),
        (None, 101, "--vocab-size 100 (--vocab-size 99 with NullTokenizer, which has a row more)"),
    ):
        found = fit.cure_of_shape("model/embedding.weight", [100, 8], [asked, 8], shape | {"tokenizer_type": tokenizer})
        assert found == [expected]
    text = "model: {vocab_size: 99}\ndata: {tokenizer_type: NullTokenizer}\n"
    assert (
        fit.model_section(text, vocab_size_as_flag=True)["vocab_size"] == 100
        and fit.model_section(text)["vocab_size"] == 99
    )
