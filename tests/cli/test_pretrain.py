"""megalith pretrain: what is shown, what is passed on, which statuses."""

import shlex
import sys
import types

import pytest
import yaml

from megalith.cli import pretrain
from megalith.cli.main import main
from megalith.common.errors import CheckpointError
from megalith.config.loading import from_yaml

TINY = shlex.split("pretrain gpt --recipe cpu-tiny --data-path a --tokenizer-model t.json")


@pytest.fixture
def trained(monkeypatch):
    """Configs handed to the training loop, which is replaced."""
    configs = []
    module = types.ModuleType("megalith.training.pretrain")
    module.train = configs.append
    monkeypatch.setitem(sys.modules, "megalith.training.pretrain", module)
    return configs


def test_dry_run_shows_a_config_that_loads_again(trained, capsys):
    assert main([*TINY, "--dry-run", "--num-layers", "3"]) == 0
    shown = capsys.readouterr()
    assert trained == [] and shown.out.startswith("# 1 processes, 1 data-parallel; 200 steps, each of 16 samples\n")
    config = from_yaml(shown.out)
    assert config.model.num_layers == 3 and config.data.data_path == ["a"]
    assert "seed" not in shown.out and "megalith: --tokenizer-type is not given: the files are of a HuggingFaceTokenizer\n" in shown.err


def test_how_much_is_shown(trained, capsys):
    assert main([*TINY, "--dry-run", "--print-config", "all", "--vocab-size", "4096"]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["batch"]["seed"] == 1234 and "# 1,334,016 parameters, activation gelu_tanh\n" in out
    assert main([*TINY, "--dry-run", "--print-config", "none"]) == 0
    assert capsys.readouterr().out == ""


def test_the_config_reaches_the_loop(trained):
    assert main([*TINY, "--train-iters", "30"]) == 0
    assert trained[0].schedule.train_iters == 30 and trained[0].model.model_type == "gpt"


def test_only_the_first_process_speaks(trained, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(TINY) == 0 and len(trained) == 1
    assert capsys.readouterr() == ("", "")


def test_world_size_is_the_launchers(trained, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1024")
    assert main(shlex.split("pretrain gpt --recipe gpt3-175b --data-path a --vocab-file v --merge-file m --dry-run")) == 0
    assert capsys.readouterr().out.startswith("# 1024 processes, 8 data-parallel; 111354 steps, each of 1536 samples\n")


def test_every_mistake_at_once_and_nothing_starts(trained, capsys):
    assert main(["pretrain", "gtp", "--recipe", "cpu-tinny", "--num-layers", "x", "--hiden-size", "3"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("megalith: 4 problems\n") and "did you mean cpu-tiny?" in text and "did you mean gpt?" in text
    assert "--num-layers: found 'x'" in text and "did you mean --hidden-size?" in text and trained == []


def test_errors_of_the_run_have_another_status(monkeypatch, capsys):
    module = types.ModuleType("megalith.training.pretrain")

    def train(config):
        raise CheckpointError("damaged")

    module.train = train
    monkeypatch.setitem(sys.modules, "megalith.training.pretrain", module)
    assert main(TINY) == 1 and capsys.readouterr().err.endswith("megalith: damaged\n")


def test_the_example_of_the_help_runs(trained, capsys):
    lines = [line.split() for line in pretrain.EXAMPLE.splitlines() if line.startswith("  megalith ")]
    assert lines and all(main(line[1:]) == 0 for line in lines)


def test_help_lists_recipes_and_sections(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "gpt", "--help"])
    text = capsys.readouterr().out
    assert ", cpu-tiny, " in text and "\nmodel:\n" in text and "  --num-layers N " in text and "--swiglu, --no-swiglu" in text
