"""`megalith checkpoint reshape`: from one layout of Megatron to another, in the words of Megatron's own tool."""

import pathlib

import pytest
import torch

from megalith.checkpoint import formats
from megalith.cli.main import main
from tests.checkpoint.megatron_files import model_of, write


@pytest.fixture
def source(tmp_path: pathlib.Path) -> tuple[pathlib.Path, dict]:
    config, tensors = model_of()
    return write(tmp_path / "from", config, tensors, tensor=2, pipeline=2, args={"orig_vocab_size": None}), tensors


def test_the_flags_of_checkpoint_util(source, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, tensors = source
    command = (
        f"checkpoint reshape --model-type GPT --loader megatron --saver megatron --load-dir {folder} --save-dir "
        f"{tmp_path / 'to'} "
        "--target-tensor-parallel-size 4 --target-pipeline-parallel-size 1 --true-vocab-size 96 --max-queue-size 50 "
        "--no-checking "
        "--megatron-path /x"
    )
    assert main(command.split()) == 0
    assert "--loader is not needed" in capsys.readouterr().out
    place = tmp_path / "to/iter_0000007"
    assert sorted(path.name for path in place.iterdir()) == [f"mp_rank_{rank:02d}" for rank in range(4)]
    back = formats.read(tmp_path / "to")
    assert (
        all(torch.equal(back[f"model/{name}"], tensor) for name, tensor in tensors.items())
        and back.train_state["consumed_train_samples"] == 56
    )


def test_a_vocabulary_file_gives_the_size(source, tmp_path: pathlib.Path) -> None:
    folder, _ = source
    (tmp_path / "vocab.txt").write_text("\n".join(map(str, range(90))) + "\n")
    assert main(f"checkpoint reshape {folder} {tmp_path / 'to'} --vocab-file {tmp_path / 'vocab.txt'}".split()) == 0
    assert formats.read(tmp_path / "to").config.model.vocab_size == 92  # with [BOS] and [EOS], which the tokenizer adds


def test_checkpoints_of_megalith_need_no_reshaping(
    source, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = source
    assert main(f"checkpoint import {folder} {tmp_path / 'ours'}".split()) == 0
    assert main(f"checkpoint reshape {tmp_path / 'ours'} {tmp_path / 'to'} --tensor-model-parallel-size 4".split()) != 0
    error = capsys.readouterr().err
    assert (
        "holds whole tensors, which any layout loads; found" in error
        and "Give --tensor-model-parallel-size" in error
        and not (tmp_path / "to").exists()
    )
