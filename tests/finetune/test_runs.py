"""Runs of `finetune` tasks: every sample once in every layout, validation by name, the best checkpoint, predictions."""

import json
import pathlib
import re

import numpy as np
import pytest

from megalith import checkpoint
from megalith.data.samples.epochs import Epochs
from megalith.testing import run_ranks
from megalith.training.best import best_so_far
from megalith.training.callbacks import ValidationRecord
from megalith.training.predictions import WritePredictions
from megalith.training.pretrain import train
from megalith.training.reporting.metrics import splits_measured_at
from megalith.training.resume.state import Progress
from tests.finetune.files import table, task_config
from tests.tiny import losses, records
from tests.training.records import run_info


def validations(run: pathlib.Path, name: str = "validation") -> list[tuple[int, float, float]]:
    """(step, loss, accuracy) of each validation."""
    return [
        (line["step"], line[f"{name}_loss"], line[f"{name}_metrics"]["accuracy"])
        for line in records(str(run)) if f"{name}_loss" in line
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> pathlib.Path:
    """A run in one process."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(task_config(files, run))
    return run


def test_validation_is_whole_by_name_and_where_epochs_end(files, whole):
    """Two epochs of 23 samples in batches of 8 end in steps 3 and 6, the last of which has 6 samples."""
    assert [step for step, *_ in validations(whole)] == [0, 3, 6]
    steps = [line for line in records(str(whole)) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    matched, mismatched = (validations(whole, f"validation/dev_{name}") for name in ("matched", "mismatched"))
    for (_, loss, accuracy), (_, one, right), (_, other, also) in zip(validations(whole), matched, mismatched):
        assert loss == pytest.approx((9 * one + 5 * other) / 14) and accuracy == pytest.approx(
            (9 * right + 5 * also) / 14
        )


def test_predictions_are_those_that_were_scored(whole):
    results = json.loads((whole / "results.json").read_text())
    for name, count in (("dev_matched", 9), ("dev_mismatched", 5)):
        rows, found = table(whole / f"predictions_{name}.tsv"), results[f"validation/{name}"]
        assert [row[0] for row in rows] == [str(number) for number in range(count)]
        probabilities = np.array([[float(cell) for cell in row[3:]] for row in rows])
        assert probabilities.shape == (count, 3) and np.allclose(probabilities.sum(1), 1, atol=1e-5)
        labels = ["contradiction", "entailment", "neutral"]
        assert [row[2] for row in rows] == [labels[column] for column in probabilities.argmax(1)]
        right = sum(row[1] == row[2] for row in rows)
        assert found["examples"] == count and found["accuracy"] == pytest.approx(right / count)
        loss = -np.log([probabilities[at, labels.index(row[1])] for at, row in enumerate(rows)]).mean()
        assert found["classification loss"] == pytest.approx(loss, abs=1e-4)
        matrix = np.array(found["confusion"]["rows_are_labels"])
        assert matrix.trace() == right and matrix.sum() == count


LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "dp2 sharded": (2, {"data_parallel_sharding": "full"}),
    "one micro-batch": (1, {"micro_batch_size": 8}),
}
SLOW = ("tp2", "dp2 sharded", "one micro-batch")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS])
def test_a_layout_gives_the_losses_and_predictions_of_one_process(files, whole, tmp_path, name):
    ranks, layout = LAYOUTS[name]
    run_ranks(train, ranks, task_config(files, tmp_path / "run", **layout))
    assert losses(str(tmp_path / "run")) == pytest.approx(losses(str(whole)), rel=1e-4)
    for each in ("validation", "validation/dev_matched"):
        assert np.allclose(validations(tmp_path / "run", each), validations(whole, each), rtol=1e-4)
    for each in ("dev_matched", "dev_mismatched"):
        mine, theirs = (table(run / f"predictions_{each}.tsv") for run in (tmp_path / "run", whole))
        assert [row[:2] for row in mine] == [row[:2] for row in theirs]
        columns = [[[float(cell) for cell in row[3:]] for row in rows] for rows in (mine, theirs)]
        assert np.allclose(*columns, atol=2e-5)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_multiple_choices(files, tmp_path, ranks):
    """10 questions in batches of 4."""
    run_ranks(train, ranks, task_config(files, tmp_path / "run", "race", global_batch_size=4))
    assert [step for step, *_ in validations(tmp_path / "run")] == [0, 3, 5]
    rows = table(tmp_path / "run/predictions_high.tsv")
    assert len(rows) == 6 and all(len(row) == 7 and row[1] in "ABCD" for row in rows)


def test_a_stopped_run_resumes_with_other_processes_and_loses_no_sample(files, whole, tmp_path):
    """Stopped after 16 of 46 samples, resumed with batches of 4: 8 steps are left, and the same samples."""
    config = task_config(files, tmp_path / "run")
    assert train(config.replace(exit_interval=2)).iteration == 2
    run_ranks(train, 2, config.replace(global_batch_size=4))
    lines = [line for line in records(str(tmp_path / "run")) if "loss" in line]
    assert [line["consumed_samples"] for line in lines] == [8, 16, 20, 24, 28, 32, 36, 40, 44, 46]
    assert losses(str(tmp_path / "run"))[:2] == losses(str(whole))[:2]


def test_a_longer_run_reads_each_sample_once_in_every_epoch(files, tmp_path, monkeypatch):
    """The first run ends in the middle of a batch of 8, after 23 samples; the next one goes on with the 24th."""
    read = list[int]()

    def note(self: Epochs, index: int) -> dict:
        read.append(index)
        return original(self, index)

    original = Epochs.__getitem__
    monkeypatch.setattr(Epochs, "__getitem__", note)
    for epochs in (1.0, 2.0):
        config = task_config(
            files, tmp_path / "run", epochs=epochs, valid_data=[], num_workers=0, override_opt_param_scheduler=True
        )
        assert train(config).consumed_train_samples == 23 * epochs
    assert [index for index in read if index < 23] == list(
        range(23)
    )  # the rest of the first run's last batch is padding
    assert read.count(23) == 2 and all(read.count(index) == 1 for index in range(24, 46))


def test_the_best_checkpoint_is_kept_and_a_resumed_run_compares_with_it(files, tmp_path, capsys, monkeypatch):
    config = task_config(files, tmp_path / "run", epochs=6.0, keep_last=1, save_interval=3, lr=1e-2)
    train(config.replace(exit_interval=12))
    train(config)
    said = re.search(r"best checkpoint \S+iter_(\d+) \(accuracy (\S+) on validation data\)", capsys.readouterr().out)
    measured = {step: accuracy for step, _, accuracy in validations(tmp_path / "run") if step}
    best = max(measured, key=lambda step: (measured[step], -step))  # the first of equals
    assert int(said[1]) == best and float(said[2]) == pytest.approx(measured[best], rel=1e-5)
    assert checkpoint.iterations(tmp_path / "run/checkpoints") == sorted({best, 18})


def test_a_finished_run_measures_other_data(files, tmp_path, capsys):
    config = task_config(files, tmp_path / "run", epochs=1.0, valid_data=[str(files / "dev_matched.tsv")])
    train(config)
    capsys.readouterr()
    other = config.replace(valid_data=[str(files / "dev_mismatched.tsv"), str(files / "test.tsv")])
    train(other)
    assert "what is left is the loss of its validation data and its predictions" in capsys.readouterr().out
    assert len(table(tmp_path / "run/predictions_dev_mismatched.tsv")) == 5
    train(other)
    assert "nothing is left to do" in capsys.readouterr().out
    measured = [line for line in records(str(tmp_path / "run")) if "validation_loss" in line]
    assert [line["step"] for line in measured] == [0, 3, 3] and len({line["data"] for line in measured}) == 2


def test_the_best_is_of_the_same_data_and_of_training(files, tmp_path):
    """Not of what was measured on other data, nor by --epochs 0, which may have been with other settings."""
    run = tmp_path / "run"
    for step in (1, 2, 3, 4):
        (run / f"checkpoints/iter_{step:07}").mkdir(parents=True)
        (run / f"checkpoints/iter_{step:07}/manifest.json").write_text("{}")
    lines = [
        (1, 0.5, {"data": "a"}),
        (2, 0.9, {"data": "b"}),
        (3, 0.8, {"data": "a", "skip_train": True}),
        (4, 0.6, {}),
    ]
    found = [{"step": step, "validation_loss": 1.0, "validation_metrics": {"accuracy": value}, **more}
             for step, value, more in lines]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    config = task_config(files, run)
    assert [best_so_far(config, 4, "accuracy", data).step for data in ("a", "b")] == [4, 2]
    assert best_so_far(config, 3, "accuracy", "a").step == 1
    assert splits_measured_at(run / "metrics.jsonl", 3, "a") == set()


def test_results_have_no_numbers_of_an_earlier_step():
    """As where the last validation failed."""
    writer = WritePredictions(None, Progress(iteration=6), {}, 8, None)
    for step in (3, 6):
        assert writer.numbers_of("validation") == {}
        writer.on_validation(run_info(), ValidationRecord(step=step, consumed_samples=8, losses={"loss": float(step)}))
    assert writer.numbers_of("validation") == writer.numbers_of("validation/one") == {"loss": 6.0}


def test_files_without_labels_are_predicted_and_not_scored(files, tmp_path, capsys):
    data = [str(files / "dev_matched.tsv"), str(files / "test.tsv")]
    train(task_config(files, tmp_path / "run", valid_data=data, epochs=1.0))
    assert "validation data test: 4 examples, without labels" in capsys.readouterr().out
    assert not validations(tmp_path / "run", "validation/test")
    rows = table(tmp_path / "run/predictions_test.tsv")
    assert len(rows) == 4 and all(row[1] == "" and row[2] for row in rows)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["validation/test"].keys() == {"examples", "predictions"}
    assert results["validation/dev_matched"]["accuracy"] == results["validation"]["accuracy"]
