"""Rules on single values, recompute, checkpoints and data; every problem at once: what, rule, found value, cure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.common.errors import ConfigError
from megalith.config.checks.checks import check, find_problems
from megalith.config.flags.values import fields
from megalith.config.run import RunConfig

GOOD = RunConfig().replace(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    seq_length=32,
    max_position_embeddings=32,
    micro_batch_size=2,
    lr=1e-3,
    train_iters=10,
    data_path=["a"],
    tokenizer_type="NullTokenizer",
)


def only(config, world_size=1):
    """The text of the single problem."""
    (problem,) = find_problems(config, world_size)
    return problem.text


def test_a_good_config_passes():
    check(GOOD)
    check(GOOD, 6)


def test_every_problem_is_in_one_error():
    with pytest.raises(ConfigError) as caught:
        check(RunConfig())
    text = str(caught.value)
    required = ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--micro-batch-size", "--lr")
    for flag in required:
        assert f"{flag} must be given, because" in text
    assert "--data-path must name the corpus" in text
    assert "The length of the run must be given" in text and "The tokenizer must be " in text


LIMITS = [
    ({"num_layers": 0}, "--num-layers must be at least 1; found 0. Write --num-layers 1 or more."),
    ({"hidden_size": -64}, "--hidden-size must be at least 1; found -64. Write --hidden-size 1 or more."),
    (
        {"train_iters": -3},
        "--train-iters must be at least 1, or 0 with --skip-train; found -3. Write --train-iters 1 or more.",
    ),
    ({"seed": -1}, "--seed must be at least 0; found -1. Write --seed 0 or more; the default is 1234."),
    (
        {"seed": 2**32},
        "--seed must be below 2 to the 32nd, as Megatron's seeds of sample orders; found 4294967296. Write a "
        "smaller one.",
    ),
    ({"lr": float("nan")}, "--lr must be a finite number; found nan. Write one after --lr."),
    (
        {"lr_decay_style": "cosin"},
        "--lr-decay-style must be one of constant, linear, cosine, inverse-square-root, WSD; found 'cosin'. "
        "Write --lr-decay-style cosine.",
    ),
    ({"normalization": "LAYERNORM"}, "Write --normalization layernorm."),
    (
        {"hidden_dropout": 1.0},
        "--hidden-dropout must be a fraction below 1; found 1.0. Write --hidden-dropout with a number between 0 and 1.",
    ),
    (
        {"adam_beta2": 1.5},
        "--adam-beta2 must be a fraction below 1; found 1.5. Write --adam-beta2 with a number between 0 and 1.",
    ),
    ({"num_layers": 2.0}, "--num-layers must be a whole number; found 2.0. Give --num-layers such a value."),
    ({"swiglu": 1}, "--swiglu must be true or false (the default is False); found 1. Give --swiglu such a value."),
    (
        {"micro_batch_size": True},
        "--micro-batch-size must be a whole number; found True. Give --micro-batch-size such a value.",
    ),
    ({"seed": None}, "--seed must have a value (the default is 1234); found nothing. Give --seed one."),
]


@pytest.mark.parametrize(
    ("values", "message"), LIMITS, ids=lambda each: next(iter(each)) if isinstance(each, dict) else ""
)
def test_limits_of_single_values(values, message):
    assert message in only(GOOD.replace(**values))


COMBINED = [
    (
        {"recompute_activations": True, "recompute_granularity": "full", "recompute_method": "uniform"},
        "--recompute-activations means --recompute-granularity selective; found --recompute-granularity full."
        " Leave out one of the two.",
    ),
    ({"recompute_granularity": "full"}, "Write --recompute-method uniform (or block)."),
    ({"recompute_method": "block"}, "Write --recompute-granularity full --recompute-method block"),
    (
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 5},
        "--recompute-num-layers must be at most --num-layers, 4; found 5. Write a smaller number.",
    ),
    (
        {"save_interval": 100, "keep_every": 250},
        "--keep-every must be a multiple of --save-interval, 100, or some of its multiples have no checkpoint to keep; "
        "found 250. Write"
        " --keep-every 200 or 300.",
    ),
    (
        {"finetune": True},
        "--finetune needs a checkpoint to load; found none. Name its folder with --load.",
    ),
    (
        {"use_checkpoint_args": True},
        "--use-checkpoint-args needs a checkpoint to read; found no --load. Name its folder with --load.",
    ),
    (
        {"num_layers": None, "load": "llama"},
        "--num-layers must be given, because a model needs it; found nothing. Write --use-checkpoint-args: "
        "the model is that of llama.",
    ),
    (
        {"data_path": []},
        "--data-path must name the corpus of the dataset; found nothing. Write --data-path PREFIX, the name "
        "without .bin and .idx that `megalith data preprocess` gave.",
    ),
    (
        {"train_data_path": ["b"]},
        "The corpus must be named in one way; found --data-path and --train-data-path. Keep one; --data-path "
        "and --data-file-list go with --split, the others name training, validation and test.",
    ),
    (
        {"data_path": [], "valid_data_path": ["b"]},
        "--valid-data-path needs --train-data-path beside it, because a run that trains needs data; found "
        "nothing. Write --train-data-path too.",
    ),
    (
        {"data_file_list": "b"},
        "The corpus must be named in one way; found --data-path and --data-file-list. Keep one; --data-path "
        "and --data-file-list go with --split, the others name training, validation and test.",
    ),
    (
        {"tokenizer_type": None},
        "The tokenizer must be the one that the data was made with, because it has the vocabulary; found "
        "nothing. Write --vocab-file FILE --merge-file FILE (GPT-2's), or --tokenizer-model tokenizer.json.",
    ),
    (
        {"split": "a,b"},
        "--split must be up to three numbers (training, validation, test), none negative, not all zero; found"
        " 'a,b'. Write for example --split 969,30,1.",
    ),
    ({"split": "1,-1,0"}, "none negative"),
    ({"split": "0,0,0"}, "Write for example --split 969,30,1."),
    (
        {"split": "1,2,3,4"},
        "--split must be up to three numbers (training, validation, test), none negative, not all zero",
    ),
    (
        {"split": "nan,1"},
        "--split must be up to three numbers (training, validation, test), none negative, not all zero",
    ),
    ({"split": "-1,2"}, "none negative"),
]


@pytest.mark.parametrize(
    ("values", "message"), COMBINED, ids=lambda each: next(iter(each)) if isinstance(each, dict) else ""
)
def test_combinations(values, message):
    assert message in only(GOOD.replace(**values))


@pytest.mark.parametrize(
    "split", ["969, 30, 1", "949,50,1", "98,2,0", "100", "90/10", "0.9,0.1", "1e2,1,1", "98 2 0", "969,30,1,"]
)
def test_splits_that_megatron_takes(split):
    check(GOOD.replace(split=split))


def test_nothing_is_read_where_no_data_is_needed():
    check(GOOD.replace(data_path=[], tokenizer_type=None), data=False)
    check(GOOD.replace(data_path=[], dataset="mine:Dataset"))


def test_huge_numbers_are_judged_at_once():
    for name in (name for name, field in fields().items() if field.kind in (int, float)):
        assert isinstance(find_problems(GOOD.replace(**{name: 10**12}), 2), list)


@given(
    st.sampled_from(sorted(fields())),
    st.sampled_from([-3, 0, 1, 2, 7, None, float("nan"), float("inf"), -1e9, 10**12]),
    st.integers(1, 9),
)
def test_no_value_makes_the_check_itself_fail(name, value, world_size):
    if fields()[name].kind in (int, float):
        assert all(problem.text for problem in find_problems(GOOD.replace(**{name: value}), world_size))


def test_one_mistake_is_reported_once():
    assert len(find_problems(GOOD.replace(hidden_size=-3, num_attention_heads=5))) == 1
    assert len(find_problems(GOOD.replace(num_layers=None, pipeline_model_parallel_size=2), 2)) == 1
