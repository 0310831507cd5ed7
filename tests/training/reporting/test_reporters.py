"""What every run has."""

from megalith.config.run import RunConfig
from megalith.training.callbacks import ValidationRecord
from megalith.training.reporting.reporters import reporters
from tests.training.records import run_info, step


def test_tensorboard_only_where_asked_for():
    assert [type(each).__name__ for each in reporters(RunConfig())] == [
        "Metrics",
        "LogLines",
        "ProgressDisplay",
        "LossPlot",
    ]
    assert type(reporters(RunConfig().replace(tensorboard_dir="board"))[-1]).__name__ == "TensorBoard"


def test_together_they_leave_a_file_and_a_picture(tmp_path, capsys):
    run = run_info(tmp_path)
    callbacks = reporters(run.config)
    for callback in callbacks:
        callback.on_start(run)
    for number in range(1, 11):
        for callback in callbacks:
            callback.on_step(run, step(number))
    for callback in callbacks:
        callback.on_validation(run, ValidationRecord(step=10, consumed_samples=80, losses={"lm loss": 2.0}))
        callback.on_end(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    out = capsys.readouterr().out
    assert (
        out.count("\n iteration ") == out.count(" | tokens per second: ") == 5
        and out.count(" validation loss at iteration 10 |") == 1
    )
