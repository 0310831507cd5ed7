"""What goes wrong among several processes is said, by rank and step, and leaves nobody waiting."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from megalith import checkpoint
from megalith.common.errors import ConfigError
from megalith.common.locks import LockedError, locked
from megalith.config.flags.loading import to_yaml
from megalith.training.pretrain import train
from tests.tiny import losses, tiny_config

ROOT = pathlib.Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node"]


def command(folder: pathlib.Path, *flags: str) -> list[str]:
    return ["-m", "megalith", "pretrain", "gpt", "--config", str(folder / "run.yaml"), "--print-config", "none", *flags]


@pytest.fixture
def start():
    """`start(words, **variables)`: Python with these words; whatever still runs after the test is killed."""
    running = []

    def begin(words: list[str], **variables: str) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen([sys.executable, *words], env=environment, **pipe))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()


def start_each(start, folder: pathlib.Path, world: int, *flags: str) -> list[subprocess.Popen]:
    """The ranks of a run without a launcher, which would end the others when one ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(command(folder, *flags), RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(world)]


def wait_for_steps(folder: pathlib.Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200  # four processes import torch
    while not (folder / "metrics.jsonl").exists() or len(losses(str(folder))) < count:
        assert time.monotonic() < deadline and process.poll() is None, "no step was made"
        time.sleep(0.05)


def endless(corpus: str, tmp_path: pathlib.Path, **changes):
    """A run that does not end by itself, written to run.yaml."""
    values = {
        "train_iters": 100000,
        "lr_decay_style": "constant",
        "eval_iters": 0,
        "save_interval": 5,
        "micro_batch_size": 1,
    }
    config = tiny_config(corpus, str(tmp_path / "run"), **(values | changes))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    return config


def last_step(output: str, rank: int, world: int) -> int:
    """The step that a rank says was its last."""
    found = re.search(
        rf"megalith: rank {rank} of {world}, after step (\d+): contact with another rank was lost", output
    )
    assert found, output
    return int(found[1])


@pytest.mark.slow
def test_the_other_ranks_end_when_one_is_killed(start, corpus, tmp_path):
    endless(corpus, tmp_path, pipeline_model_parallel_size=2, tensor_model_parallel_size=2, micro_batch_size=4)
    ranks = start_each(start, tmp_path, 4)
    wait_for_steps(tmp_path / "run", 6, ranks[0])
    ranks[1].kill()
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, -signal.SIGKILL, 1, 1]
    steps = {last_step(outputs[rank], rank, 4) for rank in (0, 2, 3)}
    assert max(steps) - min(steps) <= 1 and max(steps) >= 6
    assert abs(len(losses(str(tmp_path / "run"))) - max(steps)) <= 1
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint.verify(checkpoint.find(folder)) == [] and checkpoint.latest(folder) >= 5


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_torchrun_ends_and_names_the_killed_rank(start, corpus, tmp_path):
    endless(corpus, tmp_path)
    launcher = start([*TORCHRUN, "2", *command(tmp_path)])
    wait_for_steps(tmp_path / "run", 6, launcher)
    children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (killed,) = [pid for pid in children if b"\0RANK=1\0" in b"\0" + pathlib.Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(killed), signal.SIGKILL)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", output), output
    assert last_step(output, 0, 2) >= 6


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_the_run(start, corpus, tmp_path):
    endless(corpus, tmp_path)
    ranks = start_each(start, tmp_path, 2, "--distributed-timeout-minutes", "0.1")
    wait_for_steps(tmp_path / "run", 6, ranks[0])
    ranks[1].send_signal(signal.SIGSTOP)
    output, _ = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 1 and last_step(output, 0, 2) >= 6


def test_an_error_of_one_rank_names_it_and_the_step(ranks, corpus, tmp_path):
    with pytest.raises(ZeroDivisionError) as caught:
        ranks(failing, 2, tiny_config(corpus, str(tmp_path / "run"), eval_iters=0))
    assert "on rank 1 of 2, after step 4" in caught.value.__notes__


def failing(config) -> None:
    """On each rank of a pool; rank 1 fails in its fifth step."""
    train(config.replace(loss="tests.resume.failing:Failing"))


def different(config) -> None:
    """On each rank of a pool, of which the last was started with other flags."""
    train(config.replace(lr=2e-3, tensor_model_parallel_size=2) if dist.get_rank() == 2 else config)


def test_different_configs_are_an_error_at_the_start(ranks, corpus, tmp_path):
    config = tiny_config(corpus, str(tmp_path / "run"), global_batch_size=12)
    with pytest.raises(ConfigError) as caught:
        ranks(different, 4, config.replace(micro_batch_size=1))
    assert (
        "--tensor-model-parallel-size is 1 on rank 0 and 2 on rank 2; --lr is 0.005 on rank 0 and 0.002 on rank 2"
        in str(caught.value)
    )
    assert not (tmp_path / "run").exists()


def startup_error(config) -> str:
    """What a rank says of a run that cannot start."""
    with pytest.raises(LockedError) as caught:
        train(config)
    return str(caught.value)


def test_all_ranks_say_that_another_run_writes_the_folder(ranks, tmp_path, corpus):
    with locked(tmp_path / "run", inside=True):
        first, second = ranks(startup_error, 2, tiny_config(corpus, str(tmp_path / "run")))
    assert first == second and "is being written by process" in first


def test_a_world_that_no_layout_fits_names_the_nearest(start, corpus, tmp_path):
    endless(corpus, tmp_path, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    launcher = start([*TORCHRUN, "3", *command(tmp_path)])
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and re.search(r"exitcode\s*: 2 ", output)
    rule = "must be a multiple of tensor 2 x pipeline 2 x context 1 = 4; found 3."
    assert f"{rule} Start 4 processes, or with 3 use no model parallelism" in output
    assert not (tmp_path / "run").exists()
