"""A validation is measured after the save, hears signals, may fail, and is made up for by the next start."""

import functools
import os
import pathlib
import signal
import time

import pytest
import torch
import torch.distributed as dist

from megalith import checkpoint
from megalith.common.errors import TrainingError
from megalith.data.samples import gpt_dataset
from megalith.training.pretrain import train
from megalith.training.resume.state import Progress
from megalith.training.tasks import LanguageModelling
from megalith.training.validation import Cursor
from tests.tiny import losses, records, tiny_config

BROKEN = "MEGALITH_TEST_BROKEN"  # number of the first validation sample that cannot be read, and the rank that cannot
SIGTERM = "MEGALITH_TEST_SIGTERM"  # number of the validation batch in which SIGTERM arrives


class Unreadable:
    """A dataset, some samples of which cannot be read."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, number):
        first, rank = map(int, os.environ.get(BROKEN, "1000000 0").split())
        if number >= first and dist.get_rank() == rank:
            raise OSError(f"sample {number} lies on a broken disk")
        return self.dataset[number]

    def prepare(self):
        """As the dataset's own."""
        self.dataset.prepare()


def dataset(indexed, documents, num_samples, **keywords):
    made = gpt_dataset.from_config(indexed, documents, num_samples, **keywords)
    return made if documents[0] == 0 else Unreadable(made)


class Interrupted(LanguageModelling):
    """Language modelling; the process gets SIGTERM in a batch of validation."""

    batches = 0

    def inputs(self, batch, counts):
        if not torch.is_grad_enabled():
            self.batches += 1
            if self.batches == int(os.environ.get(SIGTERM, "0")):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
        return super().inputs(batch, counts)


class Failing(LanguageModelling):
    """Language modelling that fails in validation, within the model."""

    def inputs(self, batch, counts):
        arguments = super().inputs(batch, counts)
        if not torch.is_grad_enabled() and int(batch["samples"][0]) >= 16:
            arguments["labels"] = arguments["labels"] + 1000
        return arguments


def address(name: str) -> str:
    return f"tests.training.test_validation:{name}"


def validations(folder) -> list[tuple]:
    found = [
        (line["step"], *(line.get(f"{split}_loss") for split in ("validation", "test")))
        for line in records(str(folder))
    ]
    return [each for each in found if each[1:] != (None, None)]


def saved(folder) -> list[int]:
    return checkpoint.iterations(pathlib.Path(folder) / "checkpoints")


@pytest.mark.parametrize("batch", [1, 3, 4, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (6, 7))])
def test_sigterm_in_a_validation_saves_and_the_same_command_measures_it(corpus, tmp_path, monkeypatch, capsys, batch):
    """Batches 1 and 2 are before the first step, 3 and 4 after step 6, 5 and 6 after step 12, 7 and 8 of the test data.

    A signal in the last batch of a validation is heard later: before the next step, which is still made, or batch.
    """
    make = functools.partial(tiny_config, corpus, loss=address("Interrupted"), micro_batch_size=8)
    whole, parts = (make(str(tmp_path / name)) for name in ("whole", "parts"))
    train(whole)
    monkeypatch.setenv(SIGTERM, str(batch))
    step = {1: 0, 2: 1, 3: 6, 4: 7}.get(batch, 12)
    stopped = f"stopped after step {step} (asked by a signal)"
    assert (train(parts).stop == "asked by a signal") == (stopped in capsys.readouterr().out) == (batch != 8)
    assert saved(tmp_path / "parts") == ([step] if step else [])
    monkeypatch.delenv(SIGTERM)
    assert train(parts).iteration == 12
    assert validations(tmp_path / "parts") == validations(tmp_path / "whole") and losses(
        str(tmp_path / "parts")
    ) == losses(str(tmp_path / "whole"))
    train(parts)
    assert "nothing is left to do" in capsys.readouterr().out
    assert validations(tmp_path / "parts") == validations(tmp_path / "whole")


def test_data_that_cannot_be_read_costs_no_step(corpus, tmp_path, monkeypatch, capsys):
    whole, run = (
        tiny_config(corpus, str(tmp_path / name), dataset=address("dataset"), eval_interval=3)
        for name in ("whole", "run")
    )
    train(whole)
    monkeypatch.setenv(BROKEN, "16 0")  # of the first validation's 16 samples none
    with pytest.raises(
        TrainingError, match=r"All 12 steps are done and saved.*validation data: .*sample 4\d lies on a broken disk"
    ):
        train(run.replace(loss="lm"))
    said = capsys.readouterr()
    assert "validation data could not be read, samples 16 to 23: OSError: sample 16 lies on a broken disk" in said.err
    assert saved(tmp_path / "run") == [12] and losses(str(tmp_path / "run")) == losses(str(tmp_path / "whole"))
    assert [step for step, *_ in validations(tmp_path / "run")] == [0, 3, 12]
    monkeypatch.delenv(BROKEN)
    assert train(run).iteration == 12
    assert "what is left is the loss of its validation data" in capsys.readouterr().out
    assert validations(tmp_path / "run")[-1][:2] == validations(tmp_path / "whole")[-2][:2]


def on_ranks(config) -> None:
    """On each rank of a pool; the second cannot read."""
    os.environ[BROKEN] = "16 1"
    try:
        train(config)
    finally:
        del os.environ[BROKEN]


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}])
def test_one_rank_that_cannot_read_leaves_nobody_waiting(ranks, corpus, tmp_path, layout):
    config = tiny_config(corpus, str(tmp_path / "run"), dataset=address("dataset"), eval_interval=3, **layout)
    with pytest.raises(TrainingError, match=r"^All 12 steps are done and saved"):
        ranks(on_ranks, 2, config, timeout=60)
    assert saved(tmp_path / "run") == [12]


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_an_error_within_the_model_changes_no_step(corpus, tmp_path, capsys, precision):
    make = functools.partial(tiny_config, corpus, eval_interval=3, save_interval=6, **precision)
    train(make(str(tmp_path / "whole")))
    with pytest.raises(
        TrainingError, match="All 12 steps are done and saved, but not measured at their end: validation data"
    ):
        train(make(str(tmp_path / "run"), loss=address("Failing")))
    assert "validation loss at step 6 was not measured" in capsys.readouterr().err
    assert losses(str(tmp_path / "run")) == losses(str(tmp_path / "whole")) and saved(tmp_path / "run") == [6, 12]
    one, two = (checkpoint.read_full(tmp_path / name / "checkpoints/iter_0000012") for name in ("run", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_validation_that_was_not_counted_reads_the_next_samples():
    """Saved under one --eval-interval, resumed under another: nothing is read again, and not the last set first."""
    progress = Progress(iteration=50)
    cursor = Cursor(progress, samples=8, interval=50, length=80)
    assert cursor.due() and cursor.first == 0
    progress = Progress(iteration=50, consumed_valid_samples=16, counted_validation=40)
    assert Cursor(progress, samples=8, interval=50, length=80).first == 16
    cursor = Cursor(progress, samples=8, interval=50, length=80)
    cursor.advance()
    assert cursor.first == 16 and progress.consumed_valid_samples == 24 and progress.counted_validation == 50
    of_megatron = Progress(iteration=50, consumed_valid_samples=16)  # which counts it and does not say when
    assert Cursor(of_megatron, samples=8, interval=50, length=80).first == 8
