"""Old spellings: each acts, and a line names the new one."""

import shlex

import pytest

from megalith.config.flags import flags, legacy
from megalith.config.flags.loading import load_config
from megalith.config.flags.text import flag
from megalith.config.flags.values import convert, fields

SHAPE = shlex.split(
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --lr 1e-3"
)


def load(*more, steps=("--train-iters", "10")):
    return load_config([*SHAPE, *steps, *more], data=False)


@pytest.mark.parametrize("name", legacy.RENAMED)
def test_each_old_spelling_sets_fields_and_says_so(name):
    sets = legacy.RENAMED[name]
    like = [legacy.IN_TOKENS.get(key, key) for key in sets]
    value = next(("uniform" if "method" in key else "5" for key, value in sets.items() if value is legacy.VALUE), None)
    found = flags.read([name] if value is None else [name, value])
    assert not found.problems and set(found.values) == set(sets)
    assert all(
        convert(fields()[key], raw, key)[1] is None for key, raw in zip(like, found.values.values(), strict=True)
    )
    (notice,) = found.notices
    assert notice.startswith(f"{name} is read as --") and all(
        flag(key).removeprefix("--") in notice for key in sets if key in fields()
    )


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, by_value in legacy.BY_VALUE.items() for value in by_value]
)
def test_each_value_that_decides_what_is_set(name, value):
    found = flags.read([name, value])
    assert found.values == legacy.BY_VALUE[name][value] and not found.problems
    for key, raw in found.values.items():
        assert raw in fields()[key].metadata["choices"]
        assert found.notices == [f"{name} is read as {flag(key)} {raw}"]


def test_old_commands_resolve():
    config, notices = load(
        "--activations-checkpoint-method", "block", "--activations-checkpoint-num-layers", "2", "--warmup", ".01"
    )
    assert (config.recompute.granularity, config.recompute.recompute_method, config.recompute.recompute_num_layers) == (
        "full",
        "block",
        2,
    )
    assert config.schedule.lr_warmup_fraction == 0.01
    assert "--activations-checkpoint-method is read as --recompute-granularity full --recompute-method block" in notices
    config, _ = load("--checkpoint-activations", "--no-position-embedding", "--use-rotary-position-embeddings")
    assert config.recompute.recompute_method == "uniform" and config.model.positions == "rope"
    config, _ = load("--finetune-from", "there")
    assert config.checkpoint.load == "there" and config.checkpoint.finetune


def test_tokens_become_samples():
    config, notices = load("--train-tokens", "3201", "--lr-warmup-tokens", "320", steps=())
    assert (
        config.schedule.train_samples == 101
        and config.schedule.lr_warmup_samples == 10
        and config.schedule.train_iters is None
    )
    assert "--train-tokens 3201 is read as --train-samples 101 (of --seq-length 32 tokens)" in notices


def test_old_keys_in_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "batch_size: 3\ncheckpoint_activations: true\nmodel:\n  num_key_value_heads: 2\nuse_flash_attn: "
        "true\nDDP_impl: local\n"
    )
    words = [word for word in SHAPE if word not in ("--micro-batch-size", "2")]
    config, notices = load_config([*words, "--train-iters", "3", "--config", str(file)], data=False)
    assert (
        config.batch.micro_batch_size == 3 and config.model.num_kv_heads == 2 and config.recompute.granularity == "full"
    )
    assert f"{file}: --batch-size is read as --micro-batch-size 3" in notices
