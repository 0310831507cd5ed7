"""Text and YAML scalars to typed values."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.config.flags.values import KINDS, convert, fields
from megalith.config.run import RunConfig


def value(name, raw):
    found, problem = convert(fields()[name], raw, "--" + name)
    assert problem is None, problem
    return found


def test_every_field_is_described():
    flat = RunConfig().flat()
    assert list(fields()) == list(flat)
    assert sum(len(dataclasses.fields(section)) for section in vars(RunConfig()).values()) == len(flat), (
        "a name is used in two sections"
    )
    for name, field in fields().items():
        assert field.default == flat[name] and field.kind in KINDS.values()
        assert field.metadata["help"] and "\n" not in field.metadata["help"]
        if field.default is None:
            assert field.optional


def test_types():
    assert (
        value("num_layers", "12") == 12
        and value("train_samples", "1e6") == 1_000_000
        and value("train_samples", 3.0) == 3
    )
    assert value("lr", "1e-4") == 1e-4 and value("lr", "-1e-5") == -1e-5 and isinstance(value("lr", 1), float)
    assert value("swiglu", True) is True and value("swiglu", "False") is False
    assert value("rampup_batch_size", ["16", "16", "5859375"]) == [16, 16, 5859375]
    assert value("rampup_batch_size", "16 16 5859375") == [16, 16, 5859375]
    assert value("data_path", [0.3, "a", 0.7, "b"]) == ["0.3", "a", "0.7", "b"]
    assert value("data_path", "one") == ["one"] and value("rampup_batch_size", ["none"]) == [] == value(
        "data_path", "none"
    )
    assert (
        value("save", "none") is None
        and value("train_iters", None) is None
        and value("position_embedding_type", "none") == "none"
    )


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("num_layers", "abc"),
        ("num_layers", "1.5"),
        ("num_layers", True),
        ("num_layers", "inf"),
        ("num_layers", [1]),
        ("lr", "nan"),
        ("lr", "inf"),
        ("lr", ""),
        ("swiglu", "maybe"),
        ("swiglu", 1),
        ("seed", None),
        ("rampup_batch_size", ["16", "x"]),
        ("save", {"a": 1}),
        ("data_path", [["a"]]),
        ("hidden_dropout", "none"),
    ],
)
def test_wrong_types_are_reported(name, raw):
    found, problem = convert(fields()[name], raw, f"run.yaml: {name}")
    assert found is None and problem.fields == (name,)
    assert problem.text.startswith(f"run.yaml: {name} must be ") and f"--{name.replace('_', '-')} " in problem.text


@given(st.integers(-(10**15), 10**15))
def test_whole_numbers_survive(number):
    assert value("train_samples", str(number)) == number == value("train_samples", number)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive(number):
    assert value("lr", repr(number)) == number == value("lr", number)


@given(
    st.sampled_from(sorted(fields())),
    st.one_of(st.text(), st.none(), st.booleans(), st.floats(), st.lists(st.text()), st.integers()),
)
def test_anything_gives_a_value_of_the_type_or_a_problem(name, raw):
    field = fields()[name]
    found, trouble = convert(field, raw, name)
    if trouble is None:
        assert (found is None and field.optional) or isinstance(found, field.kind)
