"""`megalith finetune nq`: Megatron's command, one curve in every layout, average rank, what is wrong."""

import pathlib
import shlex

import pytest

from megalith.cli.main import main
from megalith.testing import run_ranks
from megalith.training.pretrain import train
from tests.finetune.files import task_config
from tests.tiny import losses, records, tiny_ict, write_sentences

TOY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 24 --max-position-embeddings 24 "
    "--vocab-file vocab.txt --device cpu --progress none --ict-head-size 16"
)
# As examples/finetune_retriever_distributed.sh of Megatron, with smaller numbers and other paths
COMMAND = (
    f"finetune --task RET-FINETUNE-NQ {TOY} --train-with-neg --train-hard-neg 1 --pretrained-checkpoint ict "
    "--num-workers 2 --tensor-model-parallel-size 1 --tokenizer-type BertWordPieceLowerCase --train-data nq-train.json "
    "--valid-data nq-dev.json --save-interval 10000 --log-interval 1 --eval-interval 100 --eval-iters 10 "
    "--weight-decay 1.0e-1 --epochs 2 --sample-rate 1.0 --hidden-dropout 0.1 --attention-dropout 0.1 "
    "--retriever-seq-length 12 --retriever-report-topk-accuracies 1 5 10 --retriever-score-scaling "
    "--micro-batch-size 8 --eval-micro-batch-size 8 --indexer-batch-size 128 --lr 2.0e-3 --lr-warmup-fraction 0.0 "
    "--DDP-impl local --no-save-optim --val-av-rank-hard-neg 2 --val-av-rank-other-neg 1"
)


def run(line: str, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Status and output of a command line."""
    status = main(shlex.split(line))
    said = capsys.readouterr()
    return status, said.out + said.err


def validations(run: pathlib.Path) -> list[dict[str, float]]:
    """Loss and metrics of each validation."""
    return [
        {"loss": line["validation_loss"], **line["validation_metrics"]}
        for line in records(str(run)) if "validation_loss" in line
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory) -> pathlib.Path:
    """A run in one process."""
    run = tmp_path_factory.mktemp("nq") / "run"
    train(task_config(files, run, "nq", micro_batch_size=8))
    return run


def test_megatrons_command(files, tmp_path, monkeypatch, capsys):
    few = {"train_iters": 1, "lr_warmup_iters": 0, "eval_iters": 0, "vocab_file": str(files / "vocab.txt")}
    train(tiny_ict(write_sentences(str(tmp_path / "tiny")), str(tmp_path / "ict"), **few))
    monkeypatch.chdir(files)
    line = COMMAND.replace("--pretrained-checkpoint ict", f"--pretrained-checkpoint {tmp_path / 'ict'}")
    status, said = run(f"{line} --save {tmp_path / 'run'}", capsys)
    assert status == 0, said
    assert "--retriever-seq-length 12 takes the place of --seq-length 24" in said
    assert "20 questions, each with 1 hard and 0 other negatives of its own; left out, as no passage" in said
    assert "8 questions, each with 2 hard and 1 other negatives of its own" in said and "holds an answer: 2" in said
    assert "--eval-micro-batch-size is not needed" in said
    assert [line["step"] for line in records(str(tmp_path / "run")) if "loss" in line] == [1, 2, 3, 4, 5]
    last = validations(tmp_path / "run")[-1]
    assert list(last) == ["loss", "top1_acc", "top5_acc", "top10_acc", "average rank"]
    assert 0 <= last["top1_acc"] <= last["top5_acc"] <= 1 and 0 <= last["average rank"] < 8 * 4
    status, said = run(f"{line} --epochs 0 --pretrained-checkpoint {tmp_path / 'run'} --save {tmp_path / 'm'}", capsys)
    assert status == 0 and validations(tmp_path / "m") == [pytest.approx(last, rel=1e-5)], said


def test_it_learns(files, tmp_path):
    """What it was trained on: the right passage moves to the front of those of 8 questions."""
    changes = {"micro_batch_size": 8, "epochs": 20.0, "lr": 3e-3, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    changes |= {"valid_data": [str(files / "nq-train.json")], "val_av_rank_other_neg": 0}
    train(task_config(files, tmp_path / "run", "nq", **changes))
    first, *_, last = validations(tmp_path / "run")
    assert last["average rank"] < first["average rank"] / 2 and last["loss"] < first["loss"]


LAYOUTS = {
    "dp2": (2, {"micro_batch_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),  # whose stages see other shapes in validation
    "tp2 dp2": (4, {"tensor_model_parallel_size": 2}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "dp2")) for name in LAYOUTS])
def test_one_curve(files, tmp_path, one_process, name):
    ranks, changes = LAYOUTS[name]
    run_ranks(train, ranks, task_config(files, tmp_path / "run", "nq", **changes))
    assert losses(str(tmp_path / "run")) == pytest.approx(losses(str(one_process)), rel=1e-4)
    assert validations(tmp_path / "run") == [pytest.approx(each, rel=1e-4) for each in validations(one_process)]


MISTAKES = {
    "finetune nq --epochs 1": "--train-data must name the files to train on",
    "finetune nq --train-data nq-train.json --epochs 1 --train-hard-neg 1": "--train-with-neg must be given with "
    "--train-hard-neg above 0",
    "finetune nq --train-data vocab.txt --epochs 1": "vocab.txt cannot be read as questions",
    "finetune nq --train-data nq-dev.csv --epochs 1": "nq-dev.csv must have questions with positive_ctxs",
    "pretrain bert --dataset nq --train-data nq-train.json --train-iters 1": "--dataset must be 'bert' for bert",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_named(files, monkeypatch, tmp_path, capsys, line):
    monkeypatch.chdir(files)
    pathlib.Path("nq-dev.csv").write_text("who\t['w1']\n")
    toy = TOY if "finetune" in line else TOY.replace("--ict-head-size 16", "")
    status, said = run(f"{line} {toy} --micro-batch-size 4 --lr 1e-3 --save {tmp_path / 'run'}", capsys)
    assert status in (1, 2) and MISTAKES[line] in said, said
