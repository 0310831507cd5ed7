"""Changed copies: what was asked for and nothing else; the source stays as it was."""

import pytest
import torch

from megalith import checkpoint
from megalith.checkpoint.store.editing import resize
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.common.errors import CheckpointError
from megalith.config.flags.loading import from_yaml, to_yaml
from megalith.config.parameters import parameter_shapes
from megalith.config.run import RunConfig

SHAPES = {
    "embedding.weight": (5, 3),
    "position_embedding.weight": (4, 3),
    "layers.0.up.weight": (5, 3),
    "head.weight": (5, 3),
    "head.bias": (5,),
}
CONFIG = RunConfig().replace(vocab_size=5, max_position_embeddings=4, seq_length=4)


@pytest.fixture
def source(tmp_path):
    draw = torch.Generator().manual_seed(0)
    state = {
        f"{part}/{name}": torch.randn(shape, generator=draw)
        for part in ("model", "optimizer/exp_avg")
        for name, shape in SHAPES.items()
    }
    state |= {f"optimizer/step/{name}": torch.tensor(7.0) for name in SHAPES}
    state["model/embedding.weight"] = state["model/embedding.weight"].bfloat16()
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    return checkpoint.save(
        tmp_path / "c",
        7,
        state,
        train_state={"samples": 3},
        config_yaml=to_yaml(CONFIG),
        files={"tokenizer.json": extra},
    ), state


def edit(source, tmp_path, **options):
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    path = checkpoint.edit(source, tmp_path / "copy", **options)
    assert before == {file.name: file.read_bytes() for file in source.iterdir()} and checkpoint.verify(path) == []
    return path, checkpoint.read_full(path)


def test_plain_copy(source, tmp_path):
    path, state = edit(source[0], tmp_path)
    assert path.name == "iter_0000007" and state.keys() == source[1].keys()
    assert all(
        torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in source[1].items()
    )
    assert from_yaml(checkpoint.read_config(path)) == CONFIG and (path / "tokenizer.json").read_text() == "{}"


def test_there_is_no_random_state_to_drop(source, tmp_path):
    _, state = edit(source[0], tmp_path, drop=["rng"])
    assert state.keys() == source[1].keys()


def test_drop_rename_iteration(source, tmp_path):
    path, state = edit(
        source[0],
        tmp_path,
        drop=["optimizer/exp_avg", "*/head.bias"],
        rename={"layers.0": "layers.9", "head.weight": "out"},
        iteration=0,
    )
    assert sorted(name for name in state if name.startswith("model/")) == [
        "model/embedding.weight", "model/layers.9.up.weight", "model/out", "model/position_embedding.weight",
    ]  # fmt: skip
    assert (
        torch.equal(state["model/out"], source[1]["model/head.weight"]) and "optimizer/step/layers.9.up.weight" in state
    )
    assert not any("exp_avg" in name for name in state)
    assert path.name == "iter_0000000" and checkpoint.read_train_state(path) | {
        "iteration": 0,
        "samples": 3,
    } == checkpoint.read_train_state(path)


@pytest.mark.parametrize("size", [2, 8])
def test_sizes(source, tmp_path, size):
    path, state = edit(source[0], tmp_path, vocab_size=size, max_position_embeddings=size + 1)
    for name, before in source[1].items():
        rows = size + 1 if "position" in name else size if "embedding" in name or "head" in name else None
        if rows is None or before.dim() == 0:
            assert torch.equal(state[name], before)
            continue
        assert state[name].shape == (rows, *before.shape[1:]) and state[name].dtype == before.dtype
        kept = min(rows, len(before))
        assert torch.equal(state[name][:kept], before[:kept])
        assert (state[name][kept:] == before.double().mean(dim=0).to(before.dtype)).all()
    wanted = CONFIG.replace(vocab_size=size, max_position_embeddings=size + 1)
    assert from_yaml(checkpoint.read_config(path)) == wanted


def test_resize_keeps_the_mean():
    tensor = torch.randn(10, 4, dtype=torch.float64)
    lazy = Lazy.of(tensor)
    assert (
        torch.allclose(resize(lazy, 30).read().mean(dim=0), tensor.mean(dim=0), atol=1e-15)
        and resize(lazy, None) is lazy
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": ["optimiser"]}, "drop: the checkpoint has nothing called 'optimiser'; did you mean 'optimizer"),
        ({"rename": {"heads": "x"}}, "rename: the checkpoint has nothing called 'heads'"),
        ({"rename": {"head.weight": "embedding.weight"}}, "rename would give two tensors the name"),
        ({"vocab_size": 0}, "vocab_size must be at least 1; found 0"),
        ({"drop": ["model"], "vocab_size": 9}, "vocab_size cannot be set to 9: the checkpoint has no parameter"),
    ],
)
def test_what_is_not_there(source, tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.edit(source[0], tmp_path / "copy", **options)
    assert not (tmp_path / "copy").exists()


def test_never_into_something_that_is_there(source, tmp_path):
    for target in (source[0], source[0].parent, tmp_path / "tokenizer.json"):
        with pytest.raises(CheckpointError, match="new folder"):
            checkpoint.edit(source[0], target)


def test_sizes_of_a_bert(tmp_path):
    """Its head has a bias with a row for each word; its other heads and the token types have none."""
    config = CONFIG.replace(
        model_type="bert", num_layers=1, hidden_size=2, num_attention_heads=1, vocab_size=4, max_position_embeddings=3
    )
    state = {f"model/{name}": torch.zeros(shape) for name, shape in parameter_shapes(config.model).items()}
    source = checkpoint.save(tmp_path / "c", 1, state, train_state={}, config_yaml=to_yaml(config))
    _, changed = edit(source, tmp_path, vocab_size=6, max_position_embeddings=5)
    wanted = config.replace(vocab_size=6, max_position_embeddings=5)
    assert {name: tuple(tensor.shape) for name, tensor in changed.items()} == {
        f"model/{name}": shape for name, shape in parameter_shapes(wanted.model).items()
    }
