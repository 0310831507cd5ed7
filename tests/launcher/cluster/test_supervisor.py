"""Why a run ended is said last, with the status of what failed first; signals reach the processes, which may save."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launcher.cluster.standins import environment

# As torchrun: two ranks by launcher/rank.py, the others get SIGTERM when one fails, and status 1 says nothing of it.
TORCHRUN = """\
import os, subprocess, sys, time
log_dir, *command = sys.argv[1:]
ranks = []
for rank in range(2):
    folder = f"{log_dir}/run_x/attempt_0/{rank}"
    os.makedirs(folder)
    added = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": f"{folder}/error.json"}
    words = [sys.executable, "-m", "megalith.launcher.rank", sys.executable, *command]
    ranks.append(subprocess.Popen(words, env=os.environ | added, start_new_session=True))
print(*(rank.pid for rank in ranks), os.getpid(), file=open("pids", "w"), flush=True)
while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
    time.sleep(0.02)
for rank in ranks:
    rank.terminate() if rank.poll() is None else None
status = [rank.wait() for rank in ranks]
print("torchrun's own report", file=sys.stderr)
sys.exit(int(any(status)))
"""
LAUNCHER = """\
import pathlib, sys
from megalith.launcher.supervisor import Supervisor
log_dir, *words = sys.argv[1:]
stdin = words[0] == "stdin"
supervisor = Supervisor(pathlib.Path(log_dir))
sys.exit(supervisor.run([sys.executable, "torchrun.py", log_dir, *words[stdin:]], {"ADDED": "1"}, stdin))
"""
RANK = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
SAVES = (
    "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'saved\\n'), sys.exit(0)))\n"
    "os.write(1, b'ready\\n')\ntime.sleep(60)\n"
)


@pytest.fixture
def start(tmp_path):
    def begin(code, *first):
        for name, text in (("torchrun.py", TORCHRUN), ("launcher.py", LAUNCHER), ("rank.py", RANK + code)):
            (tmp_path / name).write_text(text)
        words = [sys.executable, "launcher.py", str(tmp_path / "logs"), *first, "rank.py"]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            words, cwd=tmp_path, env=environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's is ignored
        )  # fmt: skip

    return begin


def test_all_is_well(start):
    process = start("os.write(1, (os.environ['ADDED'] + '\\n').encode())")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "1\n1\n" and err == "torchrun's own report\n"


def test_the_status_of_the_first_that_failed(start):
    process = start("sys.exit(7) if rank else time.sleep(60)")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 7
    *_, report, last = err.splitlines()
    assert report == "torchrun's own report"
    assert last.startswith("megalith: the run has ended with status 7: rank 1 on ") and "its messages are above" in last


def test_the_message_of_megalith_is_last(start):
    message = "megalith: 2 problems\\n  1. one\\n  2. two"
    code = (
        "import json\nif rank == 0:\n    file = open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w')\n"
        f"    json.dump({{'message': '{message}'}}, file)\n    file.close()\n    sys.exit(2)\ntime.sleep(60)"
    )
    process = start(code)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.endswith("failed with this message:\nmegalith: 2 problems\n  1. one\n  2. two\n")


def test_a_rank_that_is_killed(start):
    process = start("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 137
    last = err.splitlines()[-1]
    assert "with status 137: rank 1 on" in last and "was ended by SIGKILL, as the system does where memory" in last


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_lets_all_save(start, number):
    process = start(SAVES)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "saved\nsaved\n" and "megalith" not in err


def test_a_signal_to_all_processes_of_a_job(start, tmp_path):
    """As Slurm sends it: torchrun and its ranks do not see USR1, and the supervisor lets all save."""
    process = start(SAVES)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "saved\nsaved\n"


def test_a_second_signal_does_not_wait(start):
    process = start("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.write(1, b'ready\\n')\ntime.sleep(60)")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.wait(20) != 0


def test_the_end_of_standard_input_stops(start):
    process = start(SAVES, "stdin")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "saved\nsaved\n"


def test_each_byte_of_standard_input_is_a_signal(start):
    """As launcher/hosts.py sends them to a node: the first lets all save, a second one does not wait."""
    process = start("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.write(1, b'ready\\n')\ntime.sleep(60)", "stdin")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    process.stdin.write("\n")
    process.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.wait(20) != 0


def test_ranks_save_when_torchrun_is_killed(start, tmp_path):
    process = start(SAVES)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    os.kill(int((tmp_path / "pids").read_text().split()[-1]), signal.SIGKILL)
    out, err = process.communicate(timeout=50)
    assert process.returncode == 137 and out == "saved\nsaved\n" and "with status 137" in err
