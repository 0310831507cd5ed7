"""megalith.load: from a run, a folder of checkpoints or one checkpoint; and the command on top of it."""

import json
import pathlib
from collections.abc import Callable

import pytest
import torch

import megalith
from megalith import checkpoint
from megalith.cli.main import main
from megalith.common.errors import CheckpointError, ConfigError
from megalith.config.flags.loading import to_yaml
from megalith.config.run import RunConfig
from megalith.models.gpt import GPT
from megalith.runtime.state import weights
from megalith.workflows.conversion import convert


@pytest.fixture
def run(make: Callable[..., GPT], tokenizer, tmp_path: pathlib.Path) -> tuple[pathlib.Path, GPT]:
    """A run's folder with two checkpoints of an ALiBi model of three heads, and the model of the latest."""
    form = {"position_embedding_type": "alibi", "num_attention_heads": 3, "hidden_size": 36, "hidden_dropout": 0.5}
    model = make(**form)
    names = ("num_layers", "vocab_size", "max_position_embeddings", "init_method_std", *form)
    text = to_yaml(RunConfig().replace(**{name: getattr(model.config, name) for name in names}))
    tokenizer.save(tmp_path / "tokenizer")
    files = {f"tokenizer/{path.name}": path for path in (tmp_path / "tokenizer").iterdir()}
    folder = tmp_path / "run"
    for iteration in (10, 20):
        with torch.no_grad():
            model.embedding.weight.mul_(1.1)
        checkpoint.save(
            folder / "checkpoints", iteration, weights(model), train_state={}, config_yaml=text, files=files
        )
    return folder, model


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


def test_texts_of_a_loaded_model(run) -> None:
    folder, model = run
    loaded = megalith.load(folder, device="cpu")
    assert megalith.generate(loaded, ["Once", "Z"], seed=1, top_p=0.9) == megalith.generate(
        model, ["Once", "Z"], seed=1, top_p=0.9
    )


def command(*words: object) -> int:
    return main(["generate", "--device", "cpu", "--max-new-tokens", "12", *map(str, words)])


def test_command_streams_one_text(run, capsys: pytest.CaptureFixture) -> None:
    folder, model = run
    expected = megalith.generate(model, "Once", seed=1, max_new_tokens=12, top_k=40, temperature=0.8)[0]
    words = ("--load", folder, "--prompt", "Once", "--seed", 1, "--top-k", 40, "--temperature", 0.8)
    for more in ((), ("--no-stream",)):
        assert command(*words, *more) == 0
        assert capsys.readouterr().out == expected + "\n"


def test_command_with_several_texts(run, capsys: pytest.CaptureFixture) -> None:
    folder, model = run
    expected = megalith.generate(model, ["Once", "Z"], seed=1, num_samples=2, max_new_tokens=12)
    words = ("--load", folder, "--prompt", "Once", "--prompt", "Z", "--seed", 1, "--num-samples", 2)
    for more in ((), ("--stream",)):
        assert command(*words, *more) == 0
        assert capsys.readouterr().out == f"\n{'-' * 40}\n".join(expected) + "\n"


def test_command_with_files(run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    folder, model = run
    plain, lines, out = tmp_path / "p.txt", tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    plain.write_text("Once\n\nZürich\n", encoding="utf-8")
    lines.write_text('{"prompt": "Once"}\n"Zürich"\n', encoding="utf-8")
    expected = megalith.generate(model, ["Once", "Zürich"], temperature=0, max_new_tokens=12)
    for file in (plain, lines):
        assert (
            command(
                "--load",
                folder,
                "--prompt-file",
                file,
                "--greedy",
                "--out-file",
                out,
                *(["--overwrite"] if file is lines else []),
            )
            == 0
        )
        records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert [one["prompt"] + one["continuation"] for one in records] == expected
        assert {one["finish"] for one in records} <= {"stop", "length"} and str(out) in capsys.readouterr().out


def test_blank_lines_of_a_prompt_file_are_named(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    from megalith.workflows.prompt_files import read_prompts

    def read(name: str, text: str) -> tuple[list[str] | None, str]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        prompts = read_prompts(prompt_file=str(tmp_path / name))
        return prompts, capsys.readouterr().err

    prompts, said = read("p.txt", "a\n\nb\n  \n")
    assert prompts == ["a", "b"] and "p.txt: left out 2 blank lines (2, 4), which hold no prompt" in said
    assert read("p.txt", "\ufeffa\x0cb\u2028c\r\nd") == (["a\x0cb\u2028c", "d"], "")
    prompts, said = read("p.jsonl", '""\n\n{"prompt": "x"}\n')
    assert prompts == ["", "x"] and "1 blank line (2)" in said


def test_command_reads_standard_input_or_nothing(
    run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import io

    folder, model = run
    for text, prompt in (("Once upon\na time\n", "Once upon\na time"), ("", "")):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert command("--load", folder, "--seed", 3) == 0
        assert capsys.readouterr().out == megalith.generate(model, prompt, seed=3, max_new_tokens=12)[0] + "\n"


def test_command_with_beams(run, capsys: pytest.CaptureFixture) -> None:
    folder, model = run
    assert command("--load", folder, "--prompt", "Once", "--beam-width", 3, "--num-samples", 2) == 0
    expected = megalith.generate(model, "Once", beam_width=3, num_samples=2, max_new_tokens=12)
    assert capsys.readouterr().out == f"\n{'-' * 40}\n".join(expected) + "\n"
    assert command("--load", folder, "--prompt", "Once", "--beam-width", 3, "--greedy") == 2


def test_command_names_what_is_wrong(run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    folder, _ = run
    broken = tmp_path / "p.jsonl"
    broken.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    cases = [
        (("--load", tmp_path / "none", "--vocab-file", "no.txt"), 1, "2 problems\n  1. --load must name a file"),
        (("--load", tmp_path / "none", "--prompt", "a"), 1, "none"),
        (("--load", folder, "--prompt-file", tmp_path / "none.txt"), 1, "none.txt"),
        (("--load", folder, "--prompt-file", broken), 1, "line 2"),
        (("--load", folder, "--prompt", "a", "--top-p", 3), 2, "--top-p"),
        (("--load", folder, "--prompt", "a", "--temprature", 3), 2, "--temperature"),
        (("--load", folder, "--prompt", "a", "--dtype", "int8"), 2, "--dtype"),
    ]
    for words, status, named in cases:
        assert command(*words) == status
        assert named in capsys.readouterr().err


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
        ConfigError, match=r"is a checkpoint of megalith, which holds all .* takes none; found --num-attention-heads"
    ):
        megalith.load(folder, device="cpu", num_attention_heads=3)


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
