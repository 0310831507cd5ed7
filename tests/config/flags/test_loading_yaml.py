"""YAML to raw values: sections or flat, old spellings, every mistake named."""

import pytest

from megalith.config.flags.yaml_text import parse_yaml


def parse(content):
    problems, notices = [], []
    return parse_yaml(content, "run.yaml", problems, notices), [each.text for each in problems], notices


def test_grouped_and_flat():
    assert parse("model:\n  num_layers: 4\nlr: 1e-4\nabout: {anything: goes}\nschedule:\n") == (
        {"num_layers": 4, "lr": "1e-4"},
        [],
        [],
    )
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
        ("model: [", "is not valid YAML"),
        ("- a\n- b\n", "must map names to values"),
        ("lr: 1\nlr: 2\n", "lr is given twice"),
        ("lr: 1\noptimizer: {lr: 2}\n", "must be given once, not twice"),
        ("model: {a: {b: c}}", "unknown key a"),
        ("modell: {num_layers: 2}", "unknown key modell: did you mean model?"),
        (
            "model:\n  hidden_size:32\n",
            "model is a section, whose fields must be indented below it: hidden_size:32 has no space after the colon",
        ),
        ("num_layers:2\nhidden_size:32\n", "num_layers:2 has no space after the colon"),
        ("model: {num_layers:2}", "A key of run.yaml must be a name: num_layers:2 has no space after the colon"),
        ("1: 2", "unknown key 1"),
        ("num_experts: 8", "--num-experts 8 cannot be used"),
    ],
)
def test_every_mistake_is_named(content, message):
    _, problems, _ = parse(content)
    assert len(problems) == 1 and message in problems[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "model:\n\tnum_layers: 4\n",
            "in line 2: YAML indents by spaces, not by tabs; found '\\tnum_layers: 4'. Replace the tabs by spaces.",
        ),
        (
            "model:\n  num_layers: 4\n\thidden_size: 8\n",
            "in line 3: YAML indents by spaces, not by tabs; found '\\thidden_size: 8'.",
        ),
        (
            "lr: 1\nname: a: b\n",
            "in line 2: a line has one name and one value; found 'name: a: b'. Put text with a colon into quotes",
        ),
        ("lr: [1, 2\n", "in line 1: a bracket is not closed; found 'lr: [1, 2'. Close it."),
        ("name: 'a\n", 'in line 1: a quotation mark is not closed; found "name: \'a". Close it.'),
        (
            "model:\n    num_layers: 4\n  hidden_size: 8\n",
            "in line 3: the fields of a section begin in one column; found '  hidden_size: 8'.",
        ),
        ("lr: 1\nseed\nname: x\n", "a line is `name: value`; found "),
        (
            "lr: 1\nlr: 2\n",
            "in line 2: lr is given twice, and a name may appear only once in a section; found 'lr: 2'. Keep one.",
        ),
        ("lr: !!python/object:os.x 2\n", "without tags (!); found 'lr: !!python/object:os.x 2'. Leave the tag out."),
        (
            "lr: 1\nname: a\x07b\n",
            "in line 2: special characters are not allowed; found '\\x07'. Remove the character.",
        ),
        ("name: %x\n", "in line 1: text that begins with such a sign must be in quotes; found 'name: %x'"),
        (
            "model:\n  num_layers: 2\n  hidden_size:32\n  num_attention_heads: 2\nseed: 1\n",
            "in line 3: hidden_size:32 has no space after the colon, so that YAML reads one word; "
            "found '  hidden_size:32'. Write hidden_size: 32.",
        ),
        ("num_layers:2\nhidden_size: 32\n", "in line 1: num_layers:2 has no space after the colon"),
    ],
)
def test_what_is_no_yaml_is_said_in_plain_words(content, message):
    """The line, what stands there, the rule and the cure; no words of the parser, and no line breaks."""
    _, (problem,), _ = parse(content)
    assert problem.startswith("run.yaml is not valid YAML in line ") and message in problem
    assert "\n" not in problem and "while " not in problem and "<unicode" not in problem
