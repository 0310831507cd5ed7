"""`megalith serve`: its flags, Megatron's flags, its errors; examples/run_text_generation_server_345M.sh as it is."""

import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from megalith.cli.main import main
from megalith.cli.serve import _name
from megalith.generation.generate import complete, load
from megalith.serving import server
from megalith.serving.options import ServeOptions
from tests.generation.conftest import run  # noqa: F401 a fixture
from tests.toy import ROOT, make_corpus
from tests.toy import run as run_command


@pytest.fixture
def served_with(monkeypatch: pytest.MonkeyPatch):
    """`served_with(*words)`: status of `megalith serve`, and what it would have served: (model, name, options)."""
    calls = []

    def serve_model(*arguments: object) -> int:
        calls.append(arguments)
        return 7

    monkeypatch.setattr(server, "serve_model", serve_model, raising=False)
    monkeypatch.setattr(server, "bind", lambda host, port: socket.socket())

    def command(*words: object):
        calls.clear()
        status = main(["serve", *map(str, words)])
        return (status, *(calls[0] if calls else (None,) * 3))

    return command


def test_a_path_and_options(run, served_with, capsys) -> None:  # noqa: F811
    folder, model = run
    for words in ((folder,), ("--load", folder), (folder, "--load", folder)):
        status, served, name, options = served_with("--device", "cpu", *words)
        assert (status, name, options) == (7, "run", ServeOptions())
        assert complete(served, "Once", temperature=0.0)[0].ids == complete(model, "Once", temperature=0.0)[0].ids
    assert "megalith:" not in capsys.readouterr().err
    status, _, name, options = served_with(
        folder, "--device", "cpu", "--port", 0, "--model-name", "tiny", "--top-p", 0.9, "--allow-origins", "http://a",
        "--allow-origins", "http://b", "--host", "0.0.0.0", "--compile", "--ckpt-step", 10,
    )  # fmt: skip
    assert (status, name) == (7, "tiny")
    assert options == ServeOptions(
        port=0, model_name="tiny", top_p=0.9, allow_origins=("http://a", "http://b"), host="0.0.0.0", compile=True
    )
    assert "everybody who reaches 0.0.0.0 may use this server: --token-file" in capsys.readouterr().err
    for host in ("::1", "127.0.0.2", "localhost"):
        assert served_with(folder, "--device", "cpu", "--host", host)[0] == 7
    assert "everybody" not in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("megalith.cli.serve.load_model", lambda args: pytest.fail("it is loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["serve", str(tmp_path), "--port", str(other.getsockname()[1])]) == 2
    assert "nothing else listens on" in capsys.readouterr().err


MEGATRONS = (
    "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --num-layers 2 --hidden-size 36 --load {folder} "
    "--num-attention-heads 3 --max-position-embeddings 200 --tokenizer-type HuggingFaceTokenizer --fp16 "
    "--micro-batch-size 1 --seq-length 1024 --out-seq-length 1024 --temperature 1.0 --tokenizer-model {tokenizer} "
    "--top_p 0.9 --seed 42 --DDP-impl local --no-load-optim --no-load-rng --inference-batch-times-seqlen-threshold 512"
)


def test_megatrons_flags(run, served_with, tokenizer_file, capsys) -> None:  # noqa: F811
    folder, _ = run
    line = MEGATRONS.format(folder=folder, tokenizer=tokenizer_file)
    status, model, _, options = served_with(*shlex.split(line), "--device", "cpu")
    said = capsys.readouterr().err
    assert status == 7 and options == ServeOptions(temperature=1.0, top_p=0.9)
    assert str(next(model.model.parameters()).dtype) == "torch.float16"
    named = next(line for line in said.splitlines() if "no meaning for a server" in line)
    assert named.count("--") == 8 + 1, named  # --max-length is named as another way
    for name in ("--micro-batch-size", "--seq-length", "--out-seq-length", "--seed", "--DDP-impl", "--no-load-rng"):
        assert name in named
    status, *_ = served_with(*shlex.split(line), "--device", "cpu", "--num-layers", 3)
    assert status == 2 and "takes no others; found --num-layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ((), 2, "PATH must name what is served; found nothing"),
        (("a", "--load", "b"), 2, "PATH and --load must be one path; found a and b"),
        (("none",), 1, "PATH must name a file or folder that exists"),
        ((".", "--top-p", 3), 2, "--top-p must lie between 0 (off) and 1; found 3.0"),
        ((".", "--temperature", -1), 2, "--temperature must be at least 0"),
        ((".", "--port", 70000), 2, "--port must be at most 65535"),
        ((".", "--max-batch-size", 0), 2, "--max-batch-size must be at least 1"),
        ((".", "--token-file", "none"), 2, "--token-file must name a file that exists"),
        ((".", "--port", -1, "--token-file", "none"), 2, "2 problems\n  1. --port must be at least 0"),
        ((".", "--num-experts", 8), 2, "--num-experts cannot be used: there are no mixture-of-experts layers"),
        ((".", "--max-batch-sise", 8), 2, "did you mean --max-batch-size?"),
    ],
)
def test_what_cannot_work(words, status, message, served_with, capsys) -> None:
    assert served_with(*words)[0] == status and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "name"),
    [("runs/demo/run", "run"), ("./gpt/", "gpt"), ("https://host/a/345m.zip", "345m.zip"), (".", "model")],
)
def test_names(path, name) -> None:
    assert _name(path) == name


@pytest.mark.slow
def test_the_script_serves_what_pretrain_wrote(tmp_path: pathlib.Path) -> None:
    make_corpus(tmp_path)
    tokens = "--tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --append-eod"
    run_command(
        shlex.split(f"megalith data preprocess --input corpus.jsonl --output-prefix my-gpt2 {tokens}"), tmp_path
    )
    toy = {
        "NUM_LAYERS": "2", "HIDDEN_SIZE": "32", "NUM_HEADS": "2", "SEQ_LENGTH": "32", "PRECISION": "",
        "CHECKPOINT_PATH": "checkpoints", "VOCAB_FILE": "vocab.json", "MERGE_FILE": "merges.txt",
    }  # fmt: skip
    training = {"MICRO_BATCH": "2", "GLOBAL_BATCH": "4", "DECAY_ITERS": "2", "DATA_PATH": "my-gpt2_text_document"}
    script = str(ROOT / "examples" / "pretrain_gpt.sh")
    run_command([script, "--train-iters", "2", "--eval-iters", "1", "--run-dir", "run"], tmp_path, **toy, **training)
    environment = os.environ | toy | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "examples" / "run_text_generation_server_345M.sh")
    process = subprocess.Popen(
        [script, "--port", "0", "--device", "cpu"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        url = process.stdout.readline().strip()
        body = {"prompts": ["def main"], "tokens_to_generate": 5, "top_k": 1}
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/api", json.dumps(body).encode(), method="PUT"), timeout=60
        ) as answer:
            text = json.load(answer)["text"][0]
        expected = complete(load(tmp_path / "checkpoints", device="cpu"), "def main", max_new_tokens=5, top_k=1)[0].text
        assert text == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
