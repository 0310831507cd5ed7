"""megalith pretrain: what is shown, what is passed on, which statuses."""

import os
import shlex
import sys
import types

import numpy as np
import pytest
import yaml

from megalith.cli import pretrain
from megalith.cli.main import main
from megalith.common.errors import CheckpointError
from megalith.config.flags.loading import from_yaml
from megalith.data.indexed import IndexedWriter

CUSTOM = "megalith.config.architectures:GPT"  # as a user's model is named, module:name
TINY = shlex.split("pretrain gpt --recipe cpu-tiny --data-path a --tokenizer-model t.json")


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Configs handed to the training loop, which is replaced, in a folder with the files that they name."""
    configs = []
    monkeypatch.chdir(tmp_path)
    with IndexedWriter("a", np.uint16) as writer:
        writer.add_sequence([1, 2, 3])
        writer.end_document()
    for name in ("t.json", "v", "m"):
        (tmp_path / name).touch()
    module = types.ModuleType("megalith.training.pretrain")
    module.train = configs.append
    monkeypatch.setitem(sys.modules, "megalith.training.pretrain", module)
    return configs


def test_dry_run_shows_a_config_that_loads_again(trained, capsys):
    assert main([*TINY, "--dry-run", "--num-layers", "3"]) == 0
    shown = capsys.readouterr()
    assert trained == [] and shown.out.startswith("# 1 process, 1 data-parallel; 200 steps, each of 16 samples\n")
    config = from_yaml(shown.out)
    assert config.model.num_layers == 3 and config.data.data_path == ["a"]
    assert (
        "seed" not in shown.out
        and "megalith: --tokenizer-type is not given: the files are of a HuggingFaceTokenizer\n" in shown.err
    )


def test_how_much_is_shown(trained, capsys):
    assert main([*TINY, "--dry-run", "--print-config", "all", "--vocab-size", "4096"]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["batch"]["seed"] == 1234 and "# 1,334,016 parameters, activation gelu_tanh\n" in out
    assert main([*TINY, "--dry-run", "--print-config", "none"]) == 0
    assert capsys.readouterr().out == ""


def test_the_config_reaches_the_loop(trained):
    assert main([*TINY, "--train-iters", "30"]) == 0
    assert trained[0].schedule.train_iters == 30 and trained[0].model.model_type == "gpt"


def test_only_the_main_process_prints(trained, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(TINY) == 0 and len(trained) == 1
    assert capsys.readouterr() == ("", "")


def test_world_size_is_the_launchers(trained, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1024")
    assert (
        main(shlex.split("pretrain gpt --recipe gpt3-175b --data-path a --vocab-file v --merge-file m --dry-run")) == 0
    )
    assert capsys.readouterr().out.startswith(
        "# 1024 processes, 8 data-parallel; 111354 steps: 19802 while the batch grows from 16 to 1536 samples, then "
        "91552 of 1536\n"
    )


LARGE = shlex.split("pretrain --recipe gpt3-175b --dry-run")


def test_a_dry_run_needs_no_launcher_and_no_data(trained, capsys):
    assert main(LARGE) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("# 1024 processes, 8 data-parallel; ") and trained == []
    assert shown.err.startswith(
        "megalith: --world-size is not given: checked for 1024 processes, as recipe gpt3-175b says\n"
    )
    assert shown.err.endswith(
        "megalith: the config can work; what a run of it would not find here:\n"
        "  --data-path is not given: the name of a corpus, as `megalith data preprocess` gave it\n"
        "  --tokenizer-type is not given, nor a tokenizer's files: the data was made with one, and it has the "
        "vocabulary\n"
    )
    assert main([*LARGE, "--world-size", "256"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("# 256 processes, 2 data-parallel; ") and "--world-size" not in shown.err


def test_the_model_is_checked_all_the_same(trained, capsys):
    assert main([*LARGE, "--hidden-size", "12289", "--split", "a"]) == 2
    error = capsys.readouterr().err
    assert "--num-attention-heads must divide --hidden-size" in error and "--split must be up to three" in error
    assert "--data-path" not in error
    assert main([*LARGE, "--world-size", "200"]) == 2
    assert "The number of processes must be a multiple of tensor 8 x pipeline 16" in capsys.readouterr().err


def test_world_size_is_for_dry_runs(trained, capsys, monkeypatch):
    assert main([*TINY, "--world-size", "2"]) == 2 and trained == []
    assert (
        "--world-size must be the number of processes that were started (1); found 2. Start 2 with torchrun"
        in capsys.readouterr().err
    )
    assert main([*TINY, "--world-size", "none", "--dry-run"]) == 2
    assert "--world-size must be a whole number above 0; found 'none'" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main([*TINY, "--world-size", "2"]) == 0 and len(trained) == 1
    capsys.readouterr()
    assert main([*TINY, "--world-size", "1", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert (
        shown.out.startswith("# 1 process,")
        and "megalith: checked for --world-size 1, where 2 were started\n" in shown.err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "bert --recipe cpu-tiny",
            "The model after the verb must be gpt, because recipe cpu-tiny is of a gpt; found 'bert'. "
            "Write gpt after the verb, or add --model-type bert",
        ),
        ("gpt --recipe t5-tiny", "recipe t5-tiny is of a t5"),
        ("gpt --recipe cpu-tiny --model-type t5", "--model-type is of a t5"),
        ("t5 --config bert.yaml", "bert.yaml is of a bert"),
    ],
)
def test_a_model_that_contradicts_the_config_is_refused(words, message, trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert.yaml").write_text("about: {processes: 1}\nmodel:\n  model_type: bert\n")
    assert main(["pretrain", *words.split(), "--data-path", "a", "--vocab-file", "v"]) == 2 and trained == []
    assert message in capsys.readouterr().err


def test_a_model_of_the_config_that_there_is_not_is_one_mistake(trained, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("model_type: GPT\n")
    assert main([*TINY, "--config", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.endswith(
        "megalith: --model-type must be one of gpt, bert, t5, retro, bert_classification, bert_multiple_choice, ict, "
        "or module:name of your own; found 'GPT'. Write --model-type gpt.\n"
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("bert --recipe cpu-tiny --model-type bert", "the model is bert, where recipe cpu-tiny says gpt"),
        (f"{CUSTOM} --recipe cpu-tiny", f"the model is {CUSTOM}, where recipe cpu-tiny says gpt"),
        ("--recipe bert-tiny --config gpt.yaml", "the model is gpt, where recipe bert-tiny says bert"),
    ],
)
def test_a_model_that_overrides_another_is_reported(words, line, trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt.yaml").write_text("model_type: gpt\n")
    assert main(["pretrain", *words.split(), "--dry-run"]) == 0
    assert f"megalith: {line}\n" in capsys.readouterr().err


def test_wrong_paths_are_reported_with_the_other_mistakes(trained, capsys, tmp_path):
    (tmp_path / "runs/first/checkpoints/iter_0000007").mkdir(parents=True)
    (tmp_path / "runs/first/checkpoints/iter_0000007/manifest.json").write_text("{}")
    wrong = shlex.split("pretrain gpt --recipe cpu-tiny --data-path nope --tokenizer-model no.json --load")
    assert main([*wrong, "nowhere", "--split", "x"]) == 2 and trained == []
    shown = capsys.readouterr()
    assert shown.out == "" and "megalith: 4 problems\n  1. --split must be up to three" in shown.err
    assert "2. --data-path: no indexed dataset at nope: neither nope.bin nor nope.idx exists." in shown.err
    assert (
        "3. --tokenizer-model must name a file that exists; found 'no.json'. Correct the path after --tokenizer-model."
        in shown.err
    )
    assert "4. --load must name a file or folder that exists; found 'nowhere'. Correct the path." in shown.err
    assert main([*TINY, "--load", "runs"]) == 2 and trained == []
    assert "--load: runs is a folder of runs; name one of them: runs/first (step 7)." in capsys.readouterr().err
    assert main([*wrong, "nowhere", "--use-checkpoint-args"]) == 2
    shown = capsys.readouterr().err
    assert (
        "3 problems" in shown
        and shown.count("--load must be an existing file or folder") == 1
        and "source:" not in shown
    )
    assert main([*wrong, "nowhere", "--dry-run"]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("# 1 process") and shown.err.count("\n  --") == 3


def test_every_mistake_at_once_and_nothing_starts(trained, capsys):
    assert main(["pretrain", "gtp", "--recipe", "cpu-tinny", "--num-layers", "x", "--hiden-size", "3"]) == 2
    text = capsys.readouterr().err
    assert (
        text.startswith("megalith: 4 problems\n") and "did you mean cpu-tiny?" in text and "did you mean gpt?" in text
    )
    assert "--num-layers must be a whole number" in text and "did you mean --hidden-size?" in text and trained == []


def test_errors_of_the_run_have_another_status(trained, monkeypatch, capsys):
    module = types.ModuleType("megalith.training.pretrain")

    def train(config):
        raise CheckpointError("damaged")

    module.train = train
    monkeypatch.setitem(sys.modules, "megalith.training.pretrain", module)
    assert main(TINY) == 1 and capsys.readouterr().err.endswith("megalith: damaged\n")


def test_the_example_of_the_help_runs(trained, capsys):
    lines = [line.split() for line in pretrain.EXAMPLE.splitlines() if line.startswith("  megalith ")]
    for given, named in (
        ("a.bin", "corpus_text_document.bin"),
        ("a.idx", "corpus_text_document.idx"),
        ("t.json", "tokenizer.json"),
    ):
        os.rename(given, named)
    assert lines and all(main(line[1:]) == 0 for line in lines)


def test_help_lists_recipes_and_sections(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "gpt", "--help"])
    text = capsys.readouterr().out
    assert (
        ", cpu-tiny, " in text
        and "\nmodel:\n" in text
        and "  --num-layers N " in text
        and "--swiglu, --no-swiglu" in text
    )
