"""Arguments of Megatron's files, and the config of our checkpoints, with wrong types or out of range, give an error
message and never a traceback.
"""

import pathlib
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalith.checkpoint import formats
from megalith.checkpoint.formats.megatron.arguments import EXTRA_ARGUMENTS
from megalith.checkpoint.weights import read_megalith, write
from megalith.common.errors import CheckpointError, ConfigError
from megalith.workflows.conversion import convert
from tests.originals.families import MODELS


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a file of Megatron holds."""
    folder = tmp_path_factory.mktemp("megatron")
    MODELS["gpt2"]().save_pretrained(folder / "theirs")
    convert(folder / "theirs", folder / "megatron", to="megatron")
    (file,) = (folder / "megatron").rglob("model_optim_rng.pt")
    return torch.load(file, weights_only=False)


def file_with(folder: pathlib.Path, content: dict[str, Any], **changes: Any) -> pathlib.Path:
    """A file with these arguments changed."""
    whole = {
        name: value for name, value in vars(content["args"]).items() if not isinstance(value, torch.dtype)
    } | changes
    torch.save({**content, "args": whole}, folder / "model.pt")
    return folder / "model.pt"


WRONG = [
    (
        {"num_attention_heads": "4"},
        r"of the file: num_attention_heads must be a whole number \(without quotation marks\); found '4'",
    ),
    ({"num_attention_heads": -4}, "num_attention_heads must be at least 1; found -4. Give the right value as a flag"),
    ({"num_attention_heads": True}, "num_attention_heads must be a whole number; found True"),
    ({"hidden_dropout": 7.0}, "hidden_dropout must be a fraction below 1; found 7.0"),
    ({"layernorm_epsilon": float("nan")}, "layernorm_epsilon must be a finite number; found nan"),
    ({"swiglu": "no"}, "swiglu must be true or false; found 'no'"),
    ({"vocab_size": [3]}, r"vocab_size must be a whole number; found \[3\]"),
    ({"position_embedding_type": []}, r"position_embedding_type must be a name, or the number of one; found \[\]"),
    ({"window_size": "7"}, "window_size must be a list, each of its elements a whole number"),
    (
        {"window_size": (7, 0), "window_attn_skip_freq": "x"},
        "window_attn_skip_freq must be a whole number, or a list with a 0 or a 1 for each layer; found 'x'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=str)
def test_arguments_of_wrong_types_are_told(changes: dict, message: str, content: dict, tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        formats.read(file_with(tmp_path, content, **changes))


def test_what_the_user_says_is_not_judged_in_the_file(content: dict, tmp_path: pathlib.Path) -> None:
    file = file_with(
        tmp_path,
        content,
        num_attention_heads="4",
        hidden_dropout=None,
        layernorm_epsilon=None,
        position_embedding_type=[],
    )
    given = {"num_attention_heads": 4, "position_embedding_type": "learned_absolute"}
    model = formats.read(file, options=dict(overrides=given)).config.model
    assert (model.num_attention_heads, model.hidden_dropout, model.layernorm_epsilon) == (4, 0.1, 1e-5)
    torch.save({**content, "checkpoint_version": "three"}, file)
    with pytest.raises(CheckpointError, match="checkpoint_version must be a finite number; found 'three'"):
        formats.read(file)


OTHERS = [
    ("tokenizer_type", "PretrainedFromHF"),
    ("seq_length", 0),
    ("lr_decay_iters", 0),
    ("adam_beta1", 1.5),
    ("seed", -1),
]


@pytest.mark.parametrize(("name", "value"), OTHERS)
def test_what_our_own_checkpoints_refuse_is_left_out(
    name: str, value: Any, content: dict, tmp_path: pathlib.Path
) -> None:
    """It was written, and the checkpoint could not be opened."""
    found = formats.read(file_with(tmp_path, content, **{name: value}))
    assert any(
        note.startswith(f"{name}: {value!r} has no counterpart here and was left out; nothing is to be done if")
        for note in found.notes
    )
    write(found, tmp_path / "ours")
    assert read_megalith(tmp_path / "ours").config.flat()[name] != value


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.floats(),
    st.sampled_from([2**40, "2", "x", [], {}, [3], ["a"], (1, 2), "LayerNorm", 10**9]),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_argument_is_read_or_told(data, content: dict, tmp_path: pathlib.Path) -> None:
    names = sorted(
        {*vars(content["args"]), *EXTRA_ARGUMENTS, "window_attn_skip_freq", "num_experts", "iteration"}
        - {"params_dtype"}
    )
    changes = data.draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3))
    try:
        found = formats.read(file_with(tmp_path, content, **changes))
    except (CheckpointError, ConfigError) as error:
        assert len(str(error)) < 6000
        return
    assert all(tuple(each.read().shape) == each.shape for each in found.tensors.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_layers: -1", "num_layers must be at least 1; found -1"),
        ("num_layers: [2]", r"must be a whole number.*; found \[2\]"),
        ("hidden_dropout: 1.5", "must be a fraction below 1"),
        ("full_attention_layers: [a]", "must be a list of whole numbers"),
        ("num_layers: true", "must be a whole number.*; found True"),
        ("layernorm_epsilon: .nan", "must be a finite number"),
    ],
)
def test_a_config_of_ours_is_judged_too(
    line: str, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint, sound by its checksums, that was written with such a config."""
    MODELS["gpt2"]().save_pretrained(tmp_path / "theirs")
    monkeypatch.setattr("megalith.checkpoint.weights.to_yaml", lambda config: f"model:\n  {line}\n")
    write(formats.read(tmp_path / "theirs"), tmp_path / "ours")
    with pytest.raises(ConfigError, match=message):
        read_megalith(tmp_path / "ours")
