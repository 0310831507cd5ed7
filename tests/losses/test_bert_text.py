"""BERT on real text as it is usually trained: WordPiece, --split-sentences, both losses in one command; loss falls."""

import pathlib

import pytest

from megalith.cli.main import main
from tests.tiny import records

MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 4 "
    "--global-batch-size 8 --lr 2e-3"
)
RUN = (
    "--lr-decay-style linear --lr-warmup-fraction 0.05 --split 949,50,1 --eval-iters 2 --print-config none "
    "--progress none --device cpu"
)


@pytest.mark.parametrize(("steps", "falls"), [(20, 0.3), pytest.param(200, 2.5, marks=pytest.mark.slow)])
def test_pretraining_lowers_the_loss(steps: int, falls: float, articles: list[str], tmp_path: pathlib.Path) -> None:
    command = ["pretrain", "bert", *MODEL.split(), *RUN.split(), *articles]
    assert (
        main([*command, "--train-iters", str(steps), "--eval-interval", str(steps), "--run-dir", str(tmp_path / "run")])
        == 0
    )
    lines = records(str(tmp_path / "run"))
    first, last = (line["validation_losses"] for line in lines if "validation_losses" in line)
    assert set(first) == {"lm loss", "sop loss"}
    # Ln 30524, ln 2: nothing is known at first
    assert abs(first["lm loss"] - 10.33) < 0.1 and abs(first["sop loss"] - 0.693) < 0.05
    assert last["lm loss"] < first["lm loss"] - falls
