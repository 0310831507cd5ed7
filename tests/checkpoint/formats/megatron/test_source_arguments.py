"""Arguments of Megatron's files, and the config of our checkpoints, with wrong types or out of range: told, never a traceback."""

import pathlib
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalith.checkpoint import formats
from megalith.checkpoint.formats import Options
from megalith.checkpoint.formats.megatron.arguments import OWN
from megalith.checkpoint.weights import own, write
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


def stored(folder: pathlib.Path, content: dict[str, Any], **changes: Any) -> pathlib.Path:
    """A file with these arguments changed."""
    whole = {
        name: value for name, value in vars(content["args"]).items() if not isinstance(value, torch.dtype)
    } | changes
    torch.save({**content, "args": whole}, folder / "model.pt")
    return folder / "model.pt"


WRONG = [
    (
        {"num_attention_heads": "4"},
        r"of the file: num_attention_heads: found '4'; it is a whole number \(without quotation marks\)",
    ),
    ({"num_attention_heads": -4}, "num_attention_heads: found -4; it is at least 1. Give the right value as a flag"),
    ({"num_attention_heads": True}, "num_attention_heads: found True; it is a whole number"),
    ({"hidden_dropout": 7.0}, "hidden_dropout: found 7.0; it is a share, below 1"),
    ({"layernorm_epsilon": float("nan")}, "layernorm_epsilon: found nan; it is a finite number"),
    ({"swiglu": "no"}, "swiglu: found 'no'; it is true or false"),
    ({"vocab_size": [3]}, r"vocab_size: found \[3\]; it is a whole number"),
    ({"position_embedding_type": []}, r"position_embedding_type: found \[\]; it is a name, or the number of one"),
    ({"window_size": "7"}, "window_size: found '7'; it is a list"),
    (
        {"window_size": (7, 0), "window_attn_skip_freq": "x"},
        "window_attn_skip_freq: found 'x'; it is a whole number, or a 0 or a 1",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=str)
def test_arguments_of_wrong_types_are_told(changes: dict, message: str, content: dict, tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        formats.read(stored(tmp_path, content, **changes))


def test_what_the_user_says_is_not_judged_in_the_file(content: dict, tmp_path: pathlib.Path) -> None:
    file = stored(
        tmp_path,
        content,
        num_attention_heads="4",
        hidden_dropout=None,
        layernorm_epsilon=None,
        position_embedding_type=[],
    )
    given = {"num_attention_heads": 4, "position_embedding_type": "learned_absolute"}
    model = formats.read(file, options=Options(overrides=given)).config.model
    assert (model.num_attention_heads, model.hidden_dropout, model.layernorm_epsilon) == (4, 0.1, 1e-5)
    torch.save({**content, "checkpoint_version": "three"}, file)
    with pytest.raises(CheckpointError, match="checkpoint_version: found 'three'; it is a finite number"):
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
    found = formats.read(stored(tmp_path, content, **{name: value}))
    assert any(
        note.startswith(f"{name}: {value!r} has no counterpart here and was left out; nothing is to be done if")
        for note in found.notes
    )
    write(found, tmp_path / "ours")
    assert own(tmp_path / "ours").config.flat()[name] != value


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.floats(),
    st.sampled_from([2**40, "2", "x", [], {}, [3], ["a"], (1, 2), "LayerNorm", 10**9]),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_argument_is_read_or_told(data, content: dict, tmp_path: pathlib.Path) -> None:
    names = sorted(
        {*vars(content["args"]), *OWN, "window_attn_skip_freq", "num_experts", "iteration"} - {"params_dtype"}
    )
    changes = data.draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3))
    try:
        found = formats.read(stored(tmp_path, content, **changes))
    except (CheckpointError, ConfigError) as error:
        assert len(str(error)) < 6000
        return
    assert all(tuple(each.read().shape) == each.shape for each in found.tensors.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_layers: -1", "num_layers: found -1; it is at least 1"), ("num_layers: [2]", r"found \[2\]; it is a whole number"),
        ("hidden_dropout: 1.5", "it is a share, below 1"), ("full_attention_layers: [a]", "it is a list of whole numbers"),
        ("num_layers: true", "found True; it is a whole number"), ("layernorm_epsilon: .nan", "it is a finite number"),
    ],
)  # fmt: skip
def test_a_config_of_ours_is_judged_too(
    line: str, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint, sound by its checksums, that was written with such a config."""
    MODELS["gpt2"]().save_pretrained(tmp_path / "theirs")
    monkeypatch.setattr("megalith.checkpoint.weights.to_yaml", lambda config: f"model:\n  {line}\n")
    write(formats.read(tmp_path / "theirs"), tmp_path / "ours")
    with pytest.raises(ConfigError, match=message):
        own(tmp_path / "ours")
