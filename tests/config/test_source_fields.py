"""Fields of other programs' configurations: types, ranges, null, whole numbers written as floats."""

import math

import pytest

from megalith.common.errors import CheckpointError
from megalith.config.source_fields import Kind, Ours, checked

TABLE = {
    "layers": Ours("num_layers"), "width": Ours("kv_channels", null=True), "drop": Ours("hidden_dropout"), "act": Kind(str),
    "tied": Kind(bool), "norms": Kind(int, choices=(1, 2)), "share": Kind(float, least=0.0, most=1.0), "names": Kind(list, item=str),
    "rope": Kind(dict),
}  # fmt: skip


def test_what_is_right_passes() -> None:
    given = {
        "layers": 32.0,
        "width": None,
        "drop": 0,
        "act": None,
        "tied": False,
        "norms": 2.0,
        "share": 1,
        "other": "as it is",
    }
    found = checked(given, TABLE, "config.json")
    assert found == {"layers": 32, "width": None, "drop": 0, "tied": False, "norms": 2, "share": 1, "other": "as it is"}
    assert isinstance(found["layers"], int) and isinstance(found["norms"], int)


WRONG = [
    ("layers", "2", "config.json: layers: found '2'; it is a whole number (without quotation marks). Correct it there"),
    ("layers", True, "found True; it is a whole number"), ("layers", 2.5, "found 2.5; it is a whole number"),
    ("layers", -1, "found -1; it is at least 1"), ("layers", 2**40, "it is below 2 to the 31st"), ("layers", [2], "it is a whole number"),
    ("drop", 1.5, "it is a share, below 1"), ("drop", math.nan, "it is a finite number"), ("drop", "0.1", "(without quotation marks)"),
    ("act", 3, "it is text"), ("tied", 1, "it is true or false"), ("tied", "false", "it is true or false."),
    ("norms", 3, "it is one of 1, 2"), ("share", -0.1, "it is at least 0 and at most 1"), ("share", math.inf, "it is a finite number"),
    ("names", "a", "it is a list, each of its elements text"), ("names", ["a", 1], "each of its elements text"), ("rope", [], "an object"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=str)
def test_what_is_wrong_is_told(name: str, value: object, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        checked({name: value}, TABLE, "config.json")
    assert message in str(error.value)


def test_all_are_told_at_once() -> None:
    with pytest.raises(
        CheckpointError, match=r"3 problems\n  1\. config.json: act: .*\n  2\. config.json: layers: .*\n  3\. .*tied"
    ):
        checked({"layers": "x", "act": 1, "tied": 0, "drop": 0.1}, TABLE, "config.json")
