"""The command that starts a script, and that it is that command: arguments, exit status, signals, variables."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from megalith.common.errors import ConfigError
from megalith.launcher import local
from megalith.launcher.accelerate_config import AccelerateConfig
from megalith.launcher.local import LaunchOptions
from tests.launcher.files import SCRIPT
from tests.toy import ROOT

PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]
MACHINES = {"num_machines": 2, "num_processes": 8, "machine_rank": 1, "main_process_ip": "10.0.0.1"}


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ({}, {}, [PYTHON, "s.py", "--a"]),
        ({}, {"module": True}, [PYTHON, "-m", "s.py", "--a"]),
        ({}, {"no_python": True}, ["s.py", "--a"]),
        ({"num_processes": 2}, {}, [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "s.py", "--a"]),
        (
            {"num_processes": 2, "main_process_port": 0},
            {"module": True},
            [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "s.py", "--a"],
        ),
        (
            {"num_processes": 2, "main_process_port": 29501},
            {"no_python": True},
            [*TORCHRUN, "--master-addr", "127.0.0.1", "--master-port", "29501", "--nproc-per-node", "2", "--no-python",
             "s.py", "--a"],
        ),
        (
            {},
            {"max_restarts": 3, "tee": "3"},
            [*TORCHRUN, "--standalone", "--nproc-per-node", "1", "--max-restarts", "3", "--tee", "3", "s.py", "--a"],
        ),
        (
            MACHINES,
            {},
            [*TORCHRUN, "--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "29500",
             "--nproc-per-node", "4", "s.py", "--a"],
        ),
        (
            MACHINES | {"rdzv_backend": "c10d", "main_process_port": 7},
            {"rdzv_conf": "timeout=9"},
            [*TORCHRUN, "--nnodes", "2", "--node-rank", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.0.0.1:7",
             "--nproc-per-node", "4", "--rdzv-conf", "timeout=9", "s.py", "--a"],
        ),
    ],
)  # fmt: skip
def test_command(config, options, expected):
    assert local.command(AccelerateConfig(**config), LaunchOptions(**options), ["s.py", "--a"]) == expected


def test_threads_are_shared_and_told(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(10)))
    config = AccelerateConfig(num_processes=4)
    assert local.environment(config, LaunchOptions()) == (
        {"OMP_NUM_THREADS": "2"},
        ["OMP_NUM_THREADS is 2: 4 processes, 10 cores; --num-cpu-threads-per-process says another"],
    )
    assert local.environment(AccelerateConfig(), LaunchOptions()) == ({}, [])
    assert local.environment(config, LaunchOptions(num_cpu_threads_per_process=3)) == ({"OMP_NUM_THREADS": "3"}, [])
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert local.environment(config, LaunchOptions()) == ({}, [])
    found, _ = local.environment(config, LaunchOptions(gradient_accumulation_steps=2))
    assert found == {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}


def test_a_script_that_cannot_be_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.py").touch()
    assert "must be named" in local.script_problem(LaunchOptions(), [])
    assert "megalith launch -m gone.py" in local.script_problem(LaunchOptions(), ["gone.py"])
    assert "Leave one out" in local.script_problem(LaunchOptions(module=True, no_python=True), ["x"])
    for options, script in (({}, "there.py"), ({"module": True}, "gone"), ({"no_python": True}, "ls")):
        assert local.script_problem(LaunchOptions(**options), [script]) is None


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"found {port}. Leave it out for any that is free"):
            local.check_port(AccelerateConfig(num_processes=2, main_process_port=port))
        local.check_port(AccelerateConfig(num_processes=1, main_process_port=port))
        local.check_port(AccelerateConfig(**MACHINES, main_process_port=port))  # machine 0 listens, and this is 1
    local.check_port(AccelerateConfig(num_processes=2, main_process_port=port))


def test_the_text_can_be_typed():
    assert local.text(["python", "s.py", "a b"], {"A": "1", "B": "x y"}) == "A=1 \\\nB='x y' \\\npython s.py 'a b'"


def start(folder, code, *flags):
    """`megalith launch` of a script with that code, in a process of its own."""
    (folder / "s.py").write_text(code)
    command = [PYTHON, "-m", "megalith", "launch", *flags, "s.py", "--lr", "1", "--", "--help"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_one_process_is_plain_python(tmp_path):
    process = start(tmp_path, SCRIPT + "import time\nsys.exit(7)", "--cpu", "--mixed-precision=bf16")
    out, err = process.communicate()
    found = json.loads(out)
    assert process.returncode == 7 and found["argv"] == ["--lr", "1", "--", "--help"] and found["name"] == "__main__"
    assert found["ACCELERATE_MIXED_PRECISION"] == "bf16" and found["ACCELERATE_USE_CPU"] == "true"
    assert "RANK" not in found and err == "megalith: --num-processes is not given: 1 starts\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_script(tmp_path, number):
    code = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(9))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    process = start(tmp_path, code, "--num_processes", "1")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.communicate()
    assert process.returncode == 9


def test_a_script_that_is_killed(tmp_path):
    process = start(tmp_path, "import os\nos.kill(os.getpid(), 9)", "--num_processes", "1")
    process.communicate()
    assert process.returncode == -9


def test_two_processes(tmp_path):
    process = start(tmp_path, SCRIPT, "--num_processes", "2", "--cpu", "--num_cpu_threads_per_process", "1")
    out, err = process.communicate()
    assert process.returncode == 0, err
    first, second = sorted((json.loads(line) for line in out.splitlines()), key=lambda each: each["RANK"])
    assert (first["RANK"], second["RANK"], first["WORLD_SIZE"], second["LOCAL_RANK"]) == ("0", "1", "2", "1")
    assert first["argv"] == second["argv"] == ["--lr", "1", "--", "--help"] and first["OMP_NUM_THREADS"] == "1"
    assert second["ACCELERATE_USE_CPU"] == "true" and first["MASTER_PORT"] == second["MASTER_PORT"] != "29500"
    assert "OMP_NUM_THREADS" not in err and "torch.distributed.run" not in err


@pytest.mark.slow
def test_a_failure_among_two_processes(tmp_path):
    process = start(tmp_path, "import os, sys\nsys.exit(int(os.environ['RANK']))", "--num_processes", "2")
    process.communicate()
    assert process.returncode == 1
