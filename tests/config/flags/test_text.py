"""Words of configuration errors."""

import pytest

from megalith.common.errors import ConfigError
from megalith.config.flags.text import Words, choose, fail, field_problem, flag, nearest, unknown, value_text


def test_names_and_values_as_typed():
    assert flag("num_layers") == "--num-layers"
    assert value_text(["a", 2]) == "a 2"
    assert value_text(2.0**32) == "4294967296"
    assert value_text(1e-5) == "1e-05"
    assert value_text(float("inf")) == "inf"


def test_nearest():
    assert nearest("--hiden-size", ["--hidden-size", "--lr"]) == "--hidden-size"
    assert nearest("--zzz", ["--hidden-size"]) is None
    assert unknown("flag", "--zzz", ["--lr"], "see help") == "unknown flag --zzz: see help"


def test_choose():
    assert choose("recipe", "a", ["a", "b"]) == "a"
    with pytest.raises(ConfigError, match="unknown recipe gpt2: did you mean gpt2-small"):
        choose("recipe", "gpt2", ["gpt2-small"])
    with pytest.raises(ConfigError, match="the known ones are x, y"):
        choose("recipe", "gpt2", ["x", "y"])


def test_fail_shows_all_problems_each_once():
    fail([])
    with pytest.raises(ConfigError, match=r"^one$"):
        fail(["one", "one"])
    with pytest.raises(ConfigError) as caught:
        fail(["one", "two"])
    assert str(caught.value) == "2 problems\n  1. one\n  2. two"


def test_a_problem_of_a_field_has_the_order_of_every_message():
    text = field_problem(("lr",), "--lr", -1.0, "must be at least 0", "Write more").text
    assert text == "--lr must be at least 0; found -1.0. Write more."
    assert "found nothing." in field_problem((), "--lr", None, "r", "c").text
    assert "found both." in field_problem((), "--fp16", Words("both"), "r", "c").text
