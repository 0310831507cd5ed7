"""`megalith finetune` as it is typed: the commands of Megatron's documents, tasks of one's own, mistakes."""

import json
import pathlib
import shlex

import pytest

from megalith.cli.main import main
from tests.finetune.files import table
from tests.tiny import records

TOY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 24 --max-position-embeddings 24 "
    "--vocab-file vocab.txt --device cpu --progress none"
)
EXT = (
    "--activations-checkpoint-method uniform --save-interval 10000 --log-interval 100 --eval-interval 1000 "
    "--eval-iters 10 --weight-decay 1.0e-1 --tokenizer-type BertWordPieceLowerCase"
)
COMMANDS = {  # as in Megatron's README, with smaller numbers and other paths; the precision is a GPU's there
    "race": f"--task RACE {TOY} --train-data RACE/train/middle --valid-data RACE/dev/middle RACE/dev/high {EXT} "
    "--epochs 3 --micro-batch-size 4 --lr 1.0e-5 --lr-warmup-fraction 0.06",
    "mnli": f"--task MNLI {TOY} --train-data train.tsv --valid-data dev_matched.tsv dev_mismatched.tsv {EXT} "
    "--epochs 5 --micro-batch-size 8 --lr 5.0e-5 --lr-warmup-fraction 0.065 --keep-last",
}


def run(line: str, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Status and output of a command line."""
    try:
        status = main(shlex.split(line))
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    return status, said.out + said.err


@pytest.mark.parametrize("task", COMMANDS)
def test_megatrons_commands(files, tmp_path, monkeypatch, capsys, task):
    monkeypatch.chdir(files)
    status, said = run(f"finetune {COMMANDS[task]} --save {tmp_path / task}", capsys)
    assert status == 0, said
    steps = [line["step"] for line in records(str(tmp_path / task)) if "loss" in line]
    assert steps == list(range(1, 9 if task == "race" else 16))  # 30 questions by 4; 115 pairs by 8
    assert "--activations-checkpoint-method is read as --recompute-granularity full" in said
    assert "--eval-iters has no effect but for 0" in said and "rows are labels, columns are predictions" in said
    assert ("--keep-last without a number is not needed" in said) == (task == "mnli")
    names = {"race": ("middle", "high"), "mnli": ("dev_matched", "dev_mismatched")}[task]
    assert all((tmp_path / task / f"predictions_{name}.tsv").exists() for name in names)


def test_a_task_of_ones_own_and_a_number_to_learn(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine.yaml").write_text(
        "about: how long is it\nkind: regression\nmetrics: [pearson]\ncolumns: {text_a: text, label: words}\n"
    )
    lines = [json.dumps({"text": " ".join(["w1"] * number), "words": number}) for number in (1, 2, 3, 4, 5, 6)]
    pathlib.Path("train.jsonl").write_text("\n".join([*lines, "{", lines[0]]) + "\n")
    toy = TOY.replace("vocab.txt", str(files / "vocab.txt"))
    line = f"finetune mine.yaml {toy} --train-data train.jsonl --valid-data train.jsonl --micro-batch-size 3 --lr 1e-3"
    status, said = run(f"{line} --epochs 2 --save run", capsys)
    assert status == 0, said
    assert "left out: train.jsonl, line 7: it cannot be read" in said
    (last,) = [each for each in records("run") if each["step"] == 5 and "validation_loss" in each]
    assert -1 <= last["validation_metrics"]["pearson"] <= 1
    rows = table(pathlib.Path("run/predictions_train.tsv"))
    assert [row[1] for row in rows] == ["1", "2", "3", "4", "5", "6", "1"] and all(float(row[2]) for row in rows)
    assert len(json.loads(pathlib.Path("run/results.json").read_text())["left_out"]) == 2


MISTAKES = {
    "finetune mnly --epochs 1": "did you mean 'mnli'?",
    "finetune": "The task is not named. Write it after the verb",
    "finetune mnli --train-data absent.tsv --epochs 1": "--train-data must name files or folders that exist; found "
    "'absent.tsv'",
    "finetune mnli --epochs 1": "--train-data must name the files to train on",
    "finetune mnli --train-data train.tsv": "The length of the run must be given",
    "finetune mnli --train-data train.tsv --epochs 1 --train-iters 4": "--epochs excludes --train-iters",
    "finetune mnli --train-data train.tsv --epochs 1 --load a --pretrained-checkpoint b": "--pretrained-checkpoint "
    "excludes --load of another folder",
    "finetune mnli --train-data train.tsv --epoch 1": "did you mean --epochs?",
    "finetune mnli --valid-data train.tsv --epochs 0": "--epochs 0 needs a checkpoint to load",
    "finetune mnli rte --train-data train.tsv --epochs 1": "unexpected 'rte'",
    "finetune absent.yaml --train-data train.tsv --epochs 1": "--task must name a readable YAML file",
    "finetune mnli --num-classes 2 --train-data train.tsv --epochs 1": "--num-classes must be 3",
    "pretrain gpt --train-data train.tsv --train-iters 4": "--train-data is of a task, and there is none",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_named(files, monkeypatch, tmp_path, capsys, line):
    monkeypatch.chdir(files)
    status, said = run(f"{line} {TOY} --micro-batch-size 4 --lr 1e-3 --save {tmp_path / 'run'}", capsys)
    assert status == 2 and MISTAKES[line] in said, said


def test_a_dry_run_says_what_it_would_do(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    status, said = run(
        f"finetune mnli {TOY} --train-data train.tsv --epochs 3 --micro-batch-size 4 --lr 1 --dry-run", capsys
    )
    assert status == 0 and "3 epochs of --train-data in steps of 4 samples" in said, said
