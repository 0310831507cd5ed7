"""megalith config: answers in, a YAML file out."""

import io
import subprocess
import sys

import pytest

from megalith import recipes
from megalith.cli import config as verb
from megalith.cli.main import main
from megalith.config.flags.loading import from_yaml, load_config


@pytest.fixture
def answer(monkeypatch):
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_answers_become_a_file_that_pretrain_takes(answer, tmp_path, capsys):
    answer("gpt2-small\ngpt2-small-124m\n0.3 a 0.7 b\nvocab.json merges.txt\nmine\nabc\n30\n4\n0\n2\n")
    file = tmp_path / "run.yaml"
    assert main(["config", "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert (
        "there is no recipe 'gpt2-small'" in out
        and "--train-iters must be a whole number" in out
        and "found 'abc'" in out
        and "processes must be a whole number, at least 1; found '0'" in out
    )
    assert out.endswith(
        f"wrote {file}; next:\n  torchrun --nproc-per-node 2 -m megalith pretrain gpt --config {file}\n"
    )
    config, notices = load_config(["gpt", "--config", str(file)], world_size=2)
    assert notices == [] and config == from_yaml(file.read_text())
    assert config.data.data_path == ["0.3", "a", "0.7", "b"] and config.data.tokenizer_type == "GPT2BPETokenizer"
    assert (config.logging.name, config.schedule.train_iters, config.batch.micro_batch_size) == ("mine", 30, 4)


def test_empty_answers_take_defaults_and_nothing_is_overwritten(answer, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    answer("\na\ntokenizer.json\n\n")
    assert main(["config", "--output", str(file)]) == 0
    assert from_yaml(file.read_text()).schedule.train_iters == 200
    assert main(["config", "--output", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_answers_that_cannot_work_write_nothing(answer, tmp_path, capsys):
    answer("cpu-tiny\n\n\n\n\n5\n")
    assert main(["config", "--output", str(tmp_path / "run.yaml")]) == 2
    text = capsys.readouterr().err
    assert (
        text.startswith("megalith: 3 problems")
        and "--global-batch-size must be a multiple of" in text
        and "--data-path" in text
    )
    assert list(tmp_path.iterdir()) == []


FILES = {"gpt": "tokenizer.json", "bert": "vocab.txt\nlowered", "t5": "vocab.txt\nkept"}


def kind_of(recipe):
    return from_yaml(recipes.text(recipe)).model.model_type


# One of each kind; the others are as these.
KINDS = (
    "cpu-tiny", "bert-tiny", "t5-tiny", "gpt2-345m", "gpt3-1.3b", "gpt3-175b", "llama-3-8b", "tinyllama-tiny-continued",
)  # fmt: skip


@pytest.mark.parametrize(("processes", "length"), [("", ""), ("1", ""), ("2", "30"), ("6", "30"), ("1024", "")])
@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] * (name not in KINDS)) for name in recipes.names()]
)
def test_every_recipe_becomes_a_file_that_pretrain_accepts(
    recipe, processes, length, answer, tmp_path, capsys, monkeypatch
):
    """With the recipe's length or a short one, on its own number of processes or others.

    Each further answer is the default.
    """
    monkeypatch.chdir(tmp_path)
    kind = kind_of(recipe)
    answer(f"{recipe}\nthe_corpus\n{FILES[kind]}\nmine\n{length}\n\n{processes}\n" + 30 * "\n")
    assert main(["config"]) == 0
    out = capsys.readouterr().out
    number = int(processes or recipes.about(recipes.text(recipe))["processes"])
    command = f"megalith pretrain {kind} --config run.yaml"
    assert command in out.partition("wrote run.yaml; ")[2] and ("torchrun" in out) == (number > 1)
    assert ("--nnodes" in out) == (number > 8)
    assert main(["pretrain", kind, "--config", "run.yaml", "--dry-run"]) == 1  # its files are not here
    shown = capsys.readouterr()
    assert shown.out.startswith(f"# {number} process") and "the_corpus" in shown.err
    config = from_yaml(shown.out)
    assert config.model.model_type == kind and config.logging.name == "mine"
    assert config.data.tokenizer_type == {
        "gpt": "HuggingFaceTokenizer", "bert": "BertWordPieceLowerCase", "t5": "BertWordPieceCase"
    }[kind]  # fmt: skip


def test_other_models_do_not_take_the_file(answer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer("bert-tiny\na\nvocab.txt\n\n")
    assert main(["config"]) == 0
    assert main(["pretrain", "gpt", "--config", "run.yaml", "--dry-run"]) == 2
    assert (
        "The model after the verb must be bert, because run.yaml is of a bert; found 'gpt'" in capsys.readouterr().err
    )


def test_many_processes_are_asked_about_their_layout(answer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer("gpt3-1.3b\na\nt.json\n\n\n\n16\n5\n4\n2\n2\n1\ntrue\nfull\nbf16\nselective\n0.5\n")
    assert main(["config"]) == 0
    out = capsys.readouterr().out
    assert "processes on each machine must be a whole number, at least 1, that divides 16; found '5'" in out
    assert out.endswith(
        "wrote run.yaml; to check it, on any machine:\n  megalith pretrain gpt --config run.yaml --dry-run\n"
        "next, on each of 4 machines, with the name of one of them for FIRST:\n  torchrun --nnodes 4 --rdzv-backend "
        "c10d "
        "--rdzv-endpoint FIRST:29500 --nproc-per-node 4 -m megalith pretrain gpt --config run.yaml\n"
    )
    config = from_yaml((tmp_path / "run.yaml").read_text())
    p = config.parallel
    assert (p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size) == (2, 2, 1)
    assert p.sequence_parallel and p.sharding == "full" and config.precision.bf16 and not config.precision.fp16
    assert (
        config.recompute.granularity == "selective"
        and config.recompute.recompute_method is None
        and config.optimizer.clip_grad == 0.5
    )


def test_what_cannot_work_is_asked_again(answer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer("cpu-tiny\n\nt.json\n\n\n\n6\n\n4\n" + 10 * "\n" + "the_corpus\n" + 20 * "\n")
    assert main(["config"]) == 0
    out = capsys.readouterr().out
    assert "this cannot work yet:\n" in out and "The number of processes must be a multiple of tensor 4" in out
    assert "--data-path must name the corpus" in out
    config = from_yaml((tmp_path / "run.yaml").read_text())
    assert config.data.data_path == ["the_corpus"] and 6 % config.parallel.model_parallel_size == 0


@pytest.mark.parametrize(
    ("recipe", "answers", "fields"),
    [
        (
            "cpu-tiny",
            "vocab.txt\nvocab.json\na b c\nv.json m.txt",
            {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v.json", "merge_file": "m.txt"},
        ),
        ("cpu-tiny", "folder", {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "folder"}),
        (
            "cpu-tiny",
            "l.model\nLlama\nLlama2Tokenizer",
            {"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": "l.model"},
        ),
        (
            "bert-tiny",
            "v.json m.txt\nvocab.txt\nno\nkept",
            {"tokenizer_type": "BertWordPieceCase", "vocab_file": "vocab.txt"},
        ),
        (
            "bert-tiny",
            "tokenizer.json",
            {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "tokenizer.json"},
        ),
        ("t5-tiny", "s.model", {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "s.model"}),
    ],
)
def test_the_files_decide_the_tokenizer(recipe, answers, fields, answer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer(f"{recipe}\na\n{answers}\n")
    assert main(["config"]) == 0
    out, values = capsys.readouterr().out, from_yaml((tmp_path / "run.yaml").read_text()).flat()
    assert {name: values[name] for name in fields} == fields
    assert out.count("; found ") == answers.count("\n") - ("txt\n" in answers and "kept" in answers) - (
        "model\n" in answers
    )


def test_the_example_of_the_help_runs(tmp_path):
    line = next(line for line in verb.EXAMPLE.splitlines() if "printf" in line).replace(
        "| megalith", f"| {sys.executable} -m megalith"
    )
    root = verb.__file__.removesuffix("/megalith/cli/config.py")
    found = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "run.yaml").exists()
