"""YAML to raw values: sections or flat, old spellings, every mistake named."""

import pytest

from megalith.config.loading_yaml import parse_yaml


def parse(content):
    problems, notices = [], []
    return parse_yaml(content, "run.yaml", problems, notices), [each.text for each in problems], notices


def test_grouped_and_flat():
    assert parse("model:\n  num_layers: 4\nlr: 1e-4\nabout: {anything: goes}\nschedule:\n") == ({"num_layers": 4, "lr": "1e-4"}, [], [])
    assert parse("") == ({}, [], [])


def test_old_spellings():
    values, problems, notices = parse(
        "batch_size: 3\nmodel: {num_key_value_heads: 2}\nuse_flash_attn: true\ncheckpoint_activations: false\n"
    )
    assert values == {"micro_batch_size": "3", "num_query_groups": "2"} and problems == []
    assert notices[0] == "run.yaml: --batch-size is read as --micro-batch-size 3" and len(notices) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "is not valid YAML"), ("- a\n- b\n", "it maps names to values"), ("lr: 1\nlr: 2\n", "lr is given twice"),
        ("lr: 1\noptimizer: {lr: 2}\n", "it is given twice"), ("model: {a: {b: c}}", "unknown key a"),
        ("1: 2", "unknown key 1"), ("num_experts: 8", "--num-experts 8 cannot be used"),
    ],
)  # fmt: skip
def test_every_mistake_is_named(content, message):
    _, problems, _ = parse(content)
    assert len(problems) == 1 and message in problems[0]
