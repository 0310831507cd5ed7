"""Every extra that is missing answers in one line, before work starts."""

import json
import pathlib
import sys
import tomllib

import pytest

from megalith.cli.main import main
from megalith.common import extras
from megalith.common.errors import ConfigError
from megalith.config.flags.loading import load_config
from megalith.data.corpus.preprocess_pool import Worker

ROOT = pathlib.Path(__file__).parents[2]
RUN = [
    "--num-layers",
    "2",
    "--hidden-size",
    "8",
    "--num-attention-heads",
    "2",
    "--seq-length",
    "8",
    "--micro-batch-size",
    "1",
    "--lr",
    "1",
]
RUN += ["--train-iters", "1", "--data-path", "a"]


def test_the_table_is_that_of_pyproject():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    del listed["dev"]
    assert {requirement: extra for extra, requirements in listed.items() for requirement in requirements} == dict(
        extras.EXTRAS.values()
    )
    for package, (requirement, _) in extras.EXTRAS.items():
        assert requirement.startswith((f"{package}>=", f"{package}-cpu>="))


def test_what_the_line_says(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError) as missing:
        extras.require("ray", "--engine ray")
    assert str(missing.value) == (
        "--engine ray needs the package ray, which is not installed. Install it with pip install 'ray>=2.40'; in a "
        "clone, "
        "pip install '.[ray]' brings all that is of its kind."
    )
    with pytest.raises(
        ConfigError, match=r"^a.parquet needs the package pyarrow, which cannot be imported \(import of pyarrow.parquet"
    ):
        extras.require("pyarrow.parquet", "a.parquet")
    assert extras.missing_package("ray", "x") and extras.missing_package("zstandard", "x") is None


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("sentencex", "--input a.jsonl --split-sentences"),
        ("ray", "--input a.jsonl --engine ray"),
        ("zstandard", "--input a.jsonl b.jsonl.zst"),
        ("pyarrow.parquet", "--input a.jsonl b.parquet"),
        ("sentencepiece", "--input a.jsonl --tokenizer-type Llama2Tokenizer --tokenizer-model a.jsonl"),
        ("tiktoken", "--input a.jsonl --tokenizer-type TikTokenizer --tokenizer-model a.jsonl"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_preprocessing_leaves_nothing_behind(package, words, dry, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("a.jsonl", "b.jsonl.zst", "b.parquet"):
        (tmp_path / name).write_text(json.dumps({"text": "1 2"}) + "\n")
    (tmp_path / "b.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")  # first bytes decide, not names
    command = (
        f"data preprocess --output-prefix out --tokenizer-type NullTokenizer --vocab-size 9 --workers 1 {words}".split()
    )
    assert main(command + dry) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"needs the package {package.partition('.')[0]}, which " in error
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == [
        "a.jsonl",
        "b.jsonl.zst",
        "b.parquet",
    ]


@pytest.mark.parametrize(
    ("package", "words", "purpose"),
    [
        (
            "sentencepiece",
            "--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model m",
            "GPTSentencePieceTokenizer",
        ),
        ("tiktoken", "--tokenizer-type TikTokenizer --tokenizer-model m", "TikTokenizer"),
        ("tensorboard", "--tokenizer-type NullTokenizer --tensorboard-dir t", "--tensorboard-dir"),
    ],
)
def test_a_run_is_refused_at_once(package, words, purpose, monkeypatch):
    load_config([*RUN, *words.split()])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"^{purpose} needs the package {package}, which is not installed"):
        load_config([*RUN, *words.split()])


def test_verify_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["checkpoint", "import", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--verify"]) == 2
    assert capsys.readouterr().err.startswith(
        "megalith: --verify needs the package transformers, which is not installed"
    )


def test_the_corpus_of_a_vocabulary_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "b.jsonl.zst").write_bytes(b"")
    assert (
        main(["data", "bpe", "--input", str(tmp_path), "--vocab-size", "300", "--output", str(tmp_path / "t.json")])
        == 2
    )
    assert "needs the package zstandard" in capsys.readouterr().err


def test_a_worker_that_cannot_start_says_why(monkeypatch):
    """Its error goes to the parent, which would call a worker that ended so killed, or out of memory."""
    monkeypatch.setattr(Worker, "failure", None)
    Worker.start(None)
    with pytest.raises(AttributeError):
        Worker.run(None)
