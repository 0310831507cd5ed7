"""kill -9 at random moments of a run that saves at every step: each restart resumes from a complete checkpoint."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from megalith import checkpoint
from megalith.config.flags.loading import to_yaml
from tests.tiny import losses, tiny_config

ROOT = pathlib.Path(__file__).parents[2]


def start(folder: pathlib.Path, config) -> subprocess.Popen:
    (folder / "run.yaml").write_text(to_yaml(config))
    command = [
        sys.executable,
        "-m",
        "megalith",
        "pretrain",
        "gpt",
        "--config",
        str(folder / "run.yaml"),
        "--print-config",
        "none",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_a_checkpoint(checkpoints: pathlib.Path, newer_than: int) -> None:
    deadline = time.monotonic() + 120
    # The pointer: a killed save may leave a newer folder without it
    while (checkpoint.latest(checkpoints) or 0) <= newer_than:
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.005)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_during_saves(kills, corpus, tmp_path):
    config = tiny_config(
        corpus,
        str(tmp_path / "run"),
        train_iters=100000,
        save_interval=1,
        eval_iters=0,
        lr_decay_style="constant",
        keep_last=2,
    )
    chance, checkpoints = random.Random(7), tmp_path / "run" / "checkpoints"
    last = 0
    for _ in range(kills):
        process = start(tmp_path, config)
        wait_for_a_checkpoint(checkpoints, last)
        time.sleep(chance.random() * 0.3)  # a save takes about a tenth of a second, and the run does little else
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = checkpoint.latest(checkpoints)
        assert found > last, "the run went on from where it was"
        assert checkpoint.verify(checkpoint.find(checkpoints)) == []
        last = found
    assert len(losses(str(tmp_path / "run"))) >= last - 1, "the record was kept (the killed step's line may be missing)"


def test_sigterm_saves_and_exits_with_zero(corpus, tmp_path):
    config = tiny_config(
        corpus, str(tmp_path / "run"), train_iters=100000, save_interval=100000, eval_iters=0, lr_decay_style="constant"
    )
    process = start(tmp_path, config)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(losses(str(tmp_path / "run"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "resumes from there" in output
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") == len(losses(str(tmp_path / "run")))
