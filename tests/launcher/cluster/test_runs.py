"""Real runs by torchrun on two "nodes" of this machine: elastic ones, failures, signals."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from megalith.config.flags.loading import to_yaml
from tests.launcher.cluster.standins import environment
from tests.tiny import losses, tiny_config, write_corpus

LAUNCH = [sys.executable, "-m", "megalith", "launch"]
PRETRAIN = ["pretrain", "gpt", "--config", "run.yaml"]


@pytest.fixture
def start(tmp_path):
    """`start(words)`: a command; what still runs after the test is killed, with all it started."""
    running = []

    def begin(words):
        pipe = subprocess.PIPE
        running.append(
            subprocess.Popen(
                words, cwd=tmp_path, env=environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's is ignored
            )
        )  # fmt: skip
        return running[-1]

    yield begin
    for process in running:
        kill_tree(process.pid)
        process.wait()


def kill_tree(pid):
    """SIGKILL to a process and all its descendants, as when a machine loses power."""
    parents = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    for each in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def config_of(tmp_path, **changes):
    values = {"eval_iters": 0, "save_interval": 5, "lr_decay_style": "constant"} | changes
    config = tiny_config(write_corpus(str(tmp_path / "tiny")), str(tmp_path / "run"), **values)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    return config


def losses_of_one_process(config, folder):
    """The losses of the same run in this process."""
    from megalith.training.pretrain import train  # here, because most of these tests need no torch

    train(config.replace(run_dir=str(folder)))
    return losses(str(folder))


def wait_for_steps(tmp_path, count, process):
    deadline = time.monotonic() + 400
    while not (tmp_path / "run/metrics.jsonl").exists() or len(losses(str(tmp_path / "run"))) < count:
        assert time.monotonic() < deadline and process.poll() is None, "no step was made"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_an_elastic_run_survives_the_loss_of_a_node(start, tmp_path):
    """Node 1 dies; node 0 resumes with half of the processes, the same global batch, and the curve of one process."""
    config = config_of(tmp_path, train_iters=300)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = [*LAUNCH, "--nnodes", "1:2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--max-restarts", "3"]
    words += ["--rdzv-conf", "last_call_timeout=40", "--nproc-per-node", "1"]
    nodes = [start([*words, "--node-rank", str(number), *PRETRAIN]) for number in range(2)]
    wait_for_steps(tmp_path, 10, nodes[0])
    kill_tree(nodes[1].pid)
    out, _ = nodes[0].communicate(timeout=800)
    assert nodes[0].returncode == 0, out
    assert "2 processes" in out and "1 process" in out and "resuming after step" in out, out
    found = losses(str(tmp_path / "run"))
    assert len(found) == 300 and found == pytest.approx(losses_of_one_process(config, tmp_path / "alone"), rel=1e-4)


@pytest.mark.slow
def test_a_failing_run_ends_with_its_message_and_status(start, tmp_path):
    config_of(tmp_path, tensor_model_parallel_size=4)
    process = start([*LAUNCH, "--nproc-per-node", "2", *PRETRAIN])
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 2
    *_, last = out.splitlines()
    assert last.startswith("megalith: The number of processes must be a multiple of tensor 4"), out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_resumes(number, start, tmp_path):
    config_of(tmp_path, train_iters=1000000)
    process = start([*LAUNCH, "--nproc-per-node", "2", *PRETRAIN])
    wait_for_steps(tmp_path, 6, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0 and "stopped after step" in out, out
    steps = len(losses(str(tmp_path / "run")))
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == f"iter_{steps:07}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_restarts_resume_by_themselves(start, tmp_path):
    """A rank is killed; torchrun starts both again, and the run ends as if nothing had been."""
    config = config_of(tmp_path, train_iters=300)
    process = start([*LAUNCH, "--nproc-per-node", "2", "--max-restarts", "2", *PRETRAIN])
    wait_for_steps(tmp_path, 10, process)
    ranks = [path.parent for path in pathlib.Path("/proc").glob("[0-9]*/cwd") if _leads_to(path, tmp_path)]
    for each in ranks:
        words, variables = (each / "cmdline").read_bytes(), (each / "environ").read_bytes()
        if b"\0RANK=1\0" in variables and b"megalith\0pretrain" in words and b"launcher.rank" not in words:
            os.kill(int(each.name), signal.SIGKILL)
    out, _ = process.communicate(timeout=800)
    assert process.returncode == 0, out
    assert "resuming after step" in out
    alone = losses_of_one_process(config, tmp_path / "alone")
    assert losses(str(tmp_path / "run")) == pytest.approx(alone, rel=1e-4)


def _leads_to(link, folder):
    with contextlib.suppress(OSError):
        return os.readlink(link) == str(folder)
    return False
