"""megalith.load: from a run, a folder of checkpoints, one checkpoint, or files that lack something."""

import pathlib

import pytest
import torch

import megalith
from megalith.cli.main import main
from megalith.common.errors import CheckpointError, ConfigError
from megalith.workflows.conversion import convert


def test_every_kind_of_path_gives_the_same_model(run) -> None:
    folder, model = run
    ids = torch.tensor([[1, 2, 3, 4]])
    for path in (folder, folder / "checkpoints", folder / "checkpoints/iter_0000020", str(folder)):
        loaded = megalith.load(path, device="cpu")
        assert not loaded.training and torch.equal(loaded(ids), model(ids))
        assert loaded.config == model.config and loaded.run_config.model == model.config
        assert loaded.tokenizer.encode("Once upon") == model.tokenizer.encode("Once upon")
    older = megalith.load(folder, device="cpu", iteration=10)
    torch.testing.assert_close(older.embedding.weight * 1.1, model.embedding.weight)
    assert older.head.weight is older.embedding.weight


def test_dtypes(run) -> None:
    folder, model = run
    for name, dtype in (
        ("bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        (torch.float64, torch.float64),
        (None, torch.float32),
    ):
        loaded = megalith.load(folder, device="cpu", dtype=name)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert torch.equal(loaded.slopes, model.slopes)  # buffers keep float32
        ids = torch.tensor([[1, 2, 3, 4]])
        assert (loaded(ids) - model(ids)).abs().max() < (0.5 if dtype is torch.bfloat16 else 1e-4)
    with pytest.raises(ConfigError, match="--dtype"):
        megalith.load(folder, dtype="int3")


def test_what_is_not_there_is_named(run, tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        megalith.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="iteration 20"):
        megalith.load(run[0], iteration=30)


@pytest.mark.parametrize("files", [
    {"config.json": "{}"}, {"run/config.yaml": "num_layers: 2"}, {"checkpoints/iter_0000010/empty": ""},
    {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "b.safetensors"}}'},
    {"latest_checkpointed_iteration.txt": "10", "iter_0000010/mp_rank_00/empty": ""},
])  # fmt: skip
def test_a_folder_without_weights_is_refused(files: dict[str, str], tmp_path: pathlib.Path) -> None:
    """Megatron's server starts with random weights there, and answers garbage."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=r"must have|must be in one of the known formats"):
        megalith.load(tmp_path, device="cpu")


def test_texts_of_a_loaded_model(run) -> None:
    folder, model = run
    loaded = megalith.load(folder, device="cpu")
    assert megalith.generate(loaded, ["Once", "Z"], seed=1, top_p=0.9) == megalith.generate(
        model, ["Once", "Z"], seed=1, top_p=0.9
    )


@pytest.fixture
def bare(run, tmp_path: pathlib.Path) -> pathlib.Path:
    """A file of Megatron's that holds tensors alone, and no arguments."""
    convert(run[0], tmp_path / "megatron", to="megatron")
    (file,) = (tmp_path / "megatron").rglob("model_optim_rng.pt")
    torch.save(
        {"model": torch.load(file, weights_only=False)["model"], "checkpoint_version": 3.0}, tmp_path / "bare.pt"
    )
    return tmp_path / "bare.pt"


def test_what_a_file_lacks_can_be_given(run, bare: pathlib.Path, capsys) -> None:
    folder, model = run
    said = {
        "num_attention_heads": 3,
        "position_embedding_type": "alibi",
        "openai_gelu": True,
        "vocab_size": model.config.vocab_size,
    }
    with pytest.raises(CheckpointError, match="Give --num-attention-heads"):
        megalith.load(bare, device="cpu")
    loaded = megalith.load(bare, device="cpu", tokenizer=folder / "checkpoints/iter_0000020/tokenizer", **said)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(loaded(ids), model(ids)) and loaded.tokenizer.encode("a") == model.tokenizer.encode("a")
    assert (
        any("holds no arguments" in note for note in loaded.notes)
        and f"{bare}: the file holds no arguments" in capsys.readouterr().err
    )
    wrong = {"num_attention_heads": "x", "vocab_size": 0, "hiden_size": 3, "lr": 1.0, "glu_activation": "relu"}
    with pytest.raises(ConfigError, match=r"5 problems\n(.|\n)*hiden_size: did you mean hidden_size"):
        megalith.load(bare, device="cpu", **wrong)
    with pytest.raises(ConfigError, match=r"--qkv-layout must be one of auto, grouped.*; found 'pairs'"):
        megalith.load(bare, device="cpu", qkv_layout="pairs")
    with pytest.raises(
        ConfigError,
        match=r"is a checkpoint of megalith, which holds all .* takes no others; found --num-att",
    ):
        megalith.load(folder, device="cpu", num_attention_heads=4)
    assert torch.equal(megalith.load(folder, device="cpu", num_attention_heads=3)(ids), model(ids))


def test_the_commands_take_it_too(run, bare: pathlib.Path, tmp_path: pathlib.Path, capsys) -> None:
    folder, model = run
    said = [
        "--num-attention-heads",
        "3",
        "--position-embedding-type",
        "alibi",
        "--vocab-size",
        str(model.config.vocab_size),
    ]
    said += ["--openai-gelu", "true"]
    files = ["--tokenizer", str(folder / "checkpoints/iter_0000020/tokenizer")]
    text = ["--prompt", "Once upon", "--greedy", "--max-new-tokens", "5", "--no-stream", "--device", "cpu"]
    assert main(["generate", "--load", str(bare), *text, *said, *files]) == 0
    found = capsys.readouterr().out
    assert main(["generate", "--load", str(folder), *text]) == 0
    assert capsys.readouterr().out == found


def test_a_tokenizer_goes_along_with_every_format(run, bare: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """`import --tokenizer` from Megatron's files left it out."""
    options = dict(tokenizer=run[0] / "checkpoints/iter_0000020/tokenizer", overrides={"num_attention_heads": 3})
    convert(bare, tmp_path / "ours", to="megalith", options=options)
    assert megalith.load(tmp_path / "ours", device="cpu").tokenizer.encode("Once upon") == run[1].tokenizer.encode(
        "Once upon"
    )
