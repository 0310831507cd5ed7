"""Fields of other programs' configurations: types, ranges, null, whole numbers written as floats."""

import math

import pytest

from megalith.common.errors import CheckpointError
from megalith.config.source_fields import FieldType, RunField, checked

TABLE = {
    "layers": RunField("num_layers"),
    "width": RunField("kv_channels", null=True),
    "drop": RunField("hidden_dropout"),
    "act": FieldType(str),
    "tied": FieldType(bool),
    "norms": FieldType(int, choices=(1, 2)),
    "share": FieldType(float, least=0.0, most=1.0),
    "names": FieldType(list, item=str),
    "rope": FieldType(dict),
}


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
    (
        "layers",
        "2",
        "config.json: layers must be a whole number (without quotation marks); found '2'. Correct it there",
    ),
    ("layers", True, "must be a whole number; found True"),
    ("layers", 2.5, "must be a whole number; found 2.5"),
    ("layers", -1, "must be at least 1; found -1"),
    ("layers", 2**40, "must be below 2 to the 31st"),
    ("layers", [2], "must be a whole number"),
    ("drop", 1.5, "must be a fraction below 1"),
    ("drop", math.nan, "must be a finite number"),
    ("drop", "0.1", "(without quotation marks)"),
    ("act", 3, "must be text"),
    ("tied", 1, "must be true or false"),
    ("tied", "false", "must be true or false; found"),
    ("norms", 3, "must be one of 1, 2"),
    ("share", -0.1, "must be at least 0 and at most 1"),
    ("share", math.inf, "must be a finite number"),
    ("names", "a", "must be a list, each of its elements text"),
    ("names", ["a", 1], "each of its elements text"),
    ("rope", [], "an object"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=str)
def test_what_is_wrong_is_reported(name: str, value: object, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        checked({name: value}, TABLE, "config.json")
    assert message in str(error.value)


def test_all_are_reported_at_once() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"3 problems\n  1\. config.json: act must .*\n  2\. config.json: layers must .*\n  3\. .*tied",
    ):
        checked({"layers": "x", "act": 1, "tied": 0, "drop": 0.1}, TABLE, "config.json")
