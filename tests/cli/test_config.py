"""megalith config: answers in, a YAML file out."""

import io
import subprocess
import sys

import pytest

from megalith.cli import config as verb
from megalith.cli.main import main
from megalith.config.loading import from_yaml, load_config


@pytest.fixture
def answer(monkeypatch):
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_answers_become_a_file_that_pretrain_takes(answer, tmp_path, capsys):
    answer("gpt2-small\ngpt2-small-124m\n0.3 a 0.7 b\nvocab.json merges.txt\nmine\nabc\n30\n4\n0\n2\n")
    file = tmp_path / "run.yaml"
    assert main(["config", "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert "there is no recipe 'gpt2-small'" in out and "--train-iters: found 'abc'" in out and "processes: found '0'" in out
    assert out.endswith(f"wrote {file}; next:\n  torchrun --nproc-per-node 2 -m megalith pretrain gpt --config {file}\n")
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
    assert text.startswith("megalith: 3 problems") and "--global-batch-size: found 16" in text and "--data-path" in text
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_the_help_runs(tmp_path):
    line = next(line for line in verb.EXAMPLE.splitlines() if "printf" in line).replace("| megalith", f"| {sys.executable} -m megalith")
    root = verb.__file__.removesuffix("/megalith/cli/config.py")
    found = subprocess.run(["bash", "-c", line], cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "run.yaml").exists()
