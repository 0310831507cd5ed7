"""Rules on single values, recompute, checkpoints and data; every problem at once, each in the order what, found, rule, cure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.common.errors import ConfigError
from megalith.config.checks.checks import check, find_problems
from megalith.config.flags.values import fields
from megalith.config.run import RunConfig

GOOD = RunConfig().replace(
    num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32, max_position_embeddings=32, micro_batch_size=2, lr=1e-3,
    train_iters=10, data_path=["a"], tokenizer_type="NullTokenizer",
)  # fmt: skip


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
    for flag in (
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--seq-length",
        "--micro-batch-size",
        "--lr",
        "--data-path",
    ):
        assert f"{flag}: found nothing; " in text
    assert "length of the run: found nothing" in text and "tokenizer: found nothing" in text


LIMITS = [
    ({"num_layers": 0}, "--num-layers: found 0; it is at least 1. Write --num-layers 1 or more."),
    ({"hidden_size": -64}, "--hidden-size: found -64; it is at least 1. Write --hidden-size 1 or more."),
    (
        {"train_iters": -3},
        "--train-iters: found -3; it is at least 1, or 0 with --skip-train. Write --train-iters 1 or more.",
    ),
    ({"seed": -1}, "--seed: found -1; it is at least 0. Write --seed 0 or more; the default is 1234."),
    (
        {"seed": 2**32},
        "--seed: found 4294967296; sample orders are Megatron's, whose seeds are below 2 to the 32nd. Write a smaller one.",
    ),
    ({"lr": float("nan")}, "--lr: found nan; it is a finite number. Write one after --lr."),
    (
        {"lr_decay_style": "cosin"},
        "it is one of constant, linear, cosine, inverse-square-root, WSD. Write --lr-decay-style cosine.",
    ),
    ({"normalization": "LAYERNORM"}, "Write --normalization layernorm."),
    (
        {"hidden_dropout": 1.0},
        "--hidden-dropout: found 1.0; it is a share, below 1. Write --hidden-dropout with a number between 0 and 1.",
    ),
    ({"adam_beta2": 1.5}, "--adam-beta2: found 1.5; it is a share, below 1."),
    ({"num_layers": 2.0}, "--num-layers: found 2.0; it is a whole number. Give --num-layers such a value."),
    ({"swiglu": 1}, "--swiglu: found 1; it is true or false"),
    ({"micro_batch_size": True}, "--micro-batch-size: found True; it is a whole number"),
    ({"seed": None}, "--seed: found nothing; it needs a value; the default is 1234. Give --seed one."),
]


@pytest.mark.parametrize(
    ("values", "message"), LIMITS, ids=lambda each: next(iter(each)) if isinstance(each, dict) else ""
)
def test_limits_of_single_values(values, message):
    assert message in only(GOOD.replace(**values))


COMBINED = [
    (
        {"recompute_activations": True, "recompute_granularity": "full", "recompute_method": "uniform"},
        "it means selective",
    ),
    ({"recompute_granularity": "full"}, "Write --recompute-method uniform (or block)."),
    ({"recompute_method": "block"}, "Write --recompute-granularity full --recompute-method block"),
    (
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 5},
        "it is at most --num-layers, 4",
    ),
    (
        {"save_interval": 100, "keep_every": 250},
        "--keep-every: found 250; it must be a multiple of --save-interval, 100",
    ),
    (
        {"finetune": True},
        "--finetune: found no checkpoint folder; it needs a checkpoint to load. Name its folder with --load.",
    ),
    ({"use_checkpoint_args": True}, "--use-checkpoint-args: found no --load"),
    (
        {"num_layers": None, "load": "llama"},
        "--num-layers: found nothing; a model needs it. Write --use-checkpoint-args: the model is that of llama.",
    ),
    ({"data_path": []}, "--data-path: found nothing; the dataset needs a corpus."),
    ({"train_data_path": ["b"]}, "corpus: found --data-path and --train-data-path; it is named in one way."),
    ({"data_path": [], "valid_data_path": ["b"]}, "--valid-data-path: found no --train-data-path"),
    ({"data_file_list": "b"}, "corpus: found --data-path and --data-file-list"),
    ({"tokenizer_type": None}, "tokenizer: found nothing"),
    ({"split": "a,b"}, "--split: found 'a,b'; it is up to three shares"),
    ({"split": "1,-1,0"}, "none negative"),
    ({"split": "0,0,0"}, "Write for example --split 969,30,1."),
    ({"split": "1,2,3,4"}, "it is up to three shares"),
    ({"split": "nan,1"}, "it is up to three shares"),
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


def test_one_mistake_is_told_once():
    assert len(find_problems(GOOD.replace(hidden_size=-3, num_attention_heads=5))) == 1
    assert len(find_problems(GOOD.replace(num_layers=None, pipeline_model_parallel_size=2), 2)) == 1
