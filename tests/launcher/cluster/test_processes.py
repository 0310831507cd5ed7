"""What starts on a node: the torchrun command, the variables, and what cannot be."""

import sys

import pytest

from megalith.cli.main import main
from megalith.common.errors import ConfigError
from megalith.launcher import processes
from megalith.launcher.options import NodeOptions
from megalith.launcher.processes import read_env_file
from tests.launcher.cluster.standins import FOREIGN, rank_variables

PRETRAIN = ["pretrain", "gpt", "--config", "run.yaml"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """No launcher's variables, no accelerator, and no configuration of Accelerate's."""
    import os

    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(processes, "accelerators", lambda: 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.py").touch()
    return tmp_path


def shown(capsys, *words):
    """(what `megalith launch --dry-run` prints, what it tells)."""
    assert main(["launch", "--dry-run", *words]) == 0
    found = capsys.readouterr()
    return found.out.replace(sys.executable, "python"), found.err


RANK = "-m megalith.launcher.rank python"
TORCHRUN = "python -m torch.distributed.run"


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (PRETRAIN, "python -m megalith pretrain gpt --config run.yaml"),
        (["data", "merge", "--input", "a b"], "python -m megalith data merge --input 'a b'"),
        (
            ["--nproc-per-node", "2", *PRETRAIN],
            f"{TORCHRUN} --standalone --nproc-per-node 2 {RANK} -m megalith pretrain gpt --config run.yaml",
        ),
        (
            ["--nproc_per_node=2", "--max-restarts", "3", "--monitor-interval", "1", "s.py", "--lr", "1"],
            f"{TORCHRUN} --standalone --nproc-per-node 2 --max-restarts 3 --monitor-interval 1.0 "
            f"{RANK} s.py --lr 1",
        ),
        (
            ["--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "n0:29500", "--nproc-per-node", "8", *PRETRAIN],
            f"{TORCHRUN} --nnodes 2 --rdzv-backend c10d --rdzv-endpoint n0:29500 --rdzv-id megalith "
            f"--rdzv-conf is_host=false --nproc-per-node 8 {RANK} -m megalith pretrain gpt --config run.yaml",
        ),
        (
            ["--nnodes", "1:2", "--node-rank", "0", "--rdzv-endpoint", "127.0.0.1:7", "--rdzv-conf", "timeout=9",
             "--nproc-per-node", "1", "--module", "json.tool"],
            f"{TORCHRUN} --nnodes 1:2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:7 --rdzv-id megalith "
            f"--rdzv-conf is_host=true,timeout=9 --local-addr 127.0.0.1 --nproc-per-node 1 {RANK} -m json.tool",
        ),
    ],
)  # fmt: skip
def test_commands(words, command, capsys):
    assert shown(capsys, *words)[0] == command + "\n"


def test_one_process_for_each_accelerator(capsys, monkeypatch):
    monkeypatch.setattr(processes, "accelerators", lambda: 8)
    out, err = shown(capsys, *PRETRAIN)
    assert "--nproc-per-node 8" in out and "--nproc-per-node is not given: 8 processes, one for each accelerator" in err
    out, err = shown(capsys, *PRETRAIN, "--device", "cpu")
    assert out.startswith("python -m megalith pretrain") and "not given: 1 process\n" in err


def test_a_script_that_srun_starts_several_times_is_one_training(capsys, monkeypatch, tmp_path):
    for name, value in rank_variables("srun", 1, 2, "5").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    (tmp_path / "train.py").touch()
    out, err = shown(capsys, str(tmp_path / "train.py"))
    assert "RANK=1" in out and "srun started 2 processes on 1 nodes; this is rank 1" in err


def test_values_of_an_env_file_are_not_shown(capsys, tmp_path):
    (tmp_path / "env").write_text("TOKEN=secret\n")
    out, err = shown(capsys, "--env-file", str(tmp_path / "env"), *PRETRAIN)
    assert f"# and the variables of {tmp_path / 'env'}\n" in out and "secret" not in out + err


def test_under_srun_with_one_task_on_each_node(capsys, monkeypatch):
    for name, value in rank_variables("srun", 1, 2, "5").items():
        monkeypatch.setenv(name, value)
    for name, value in {
        "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "gpu[3-4]",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    out, err = shown(capsys, "--nproc-per-node", "4", *PRETRAIN)
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint gpu3:" in out and "is_host=false --nproc-per-node 4" in out
    assert "--rdzv-id 5 " in out and "srun started 2 processes on 2 nodes; this is rank 1" in err


def test_under_mpiexec_each_task_is_a_process(capsys, monkeypatch):
    for name, value in rank_variables("PMI", 1, 2, "5").items():
        monkeypatch.setenv(name, value)
    out, _ = shown(capsys, *PRETRAIN)
    assert out.startswith(
        "RANK=1 \\\nWORLD_SIZE=2 \\\nLOCAL_RANK=1 \\\nLOCAL_WORLD_SIZE=2 \\\nMASTER_ADDR=127.0.0.1 \\\n"
    )
    assert out.endswith("python -m megalith pretrain gpt --config run.yaml\n") and "torch.distributed" not in out
    for words, message in (
        (["--nproc-per-node", "4"], "must be 2, the processes that mpiexec started on this node"),
        (["--nnodes", "2"], "must allow the number of nodes on which mpiexec started this command, 1"),
        (["--node-rank", "3"], "must be 0, which mpiexec says"),
    ):
        assert main(["launch", "--dry-run", *words, *PRETRAIN]) == 2
        assert message in capsys.readouterr().err


def test_variables_are_printed(capsys, folder, monkeypatch):
    (folder / "env").write_text("# site\nexport A=1\nB='x y'\n\nOMP_NUM_THREADS=7\n")
    out, err = shown(capsys, "--env-file", "env", "--proxy", "http://p:3128", "--nproc-per-node", "2", "s.py")
    for text in ("# and the variables of env\n", "http_proxy=http://p:3128 \\\n", "HTTPS_PROXY=http://p:3128 \\\n"):
        assert text in out
    monkeypatch.delenv("OMP_NUM_THREADS")
    out, err = shown(capsys, "--nproc-per-node", "2", "s.py")
    assert "OMP_NUM_THREADS=" in out and "OMP_NUM_THREADS is" in err and "2 processes" in err


@pytest.mark.parametrize("line", ["A", "A B=1", "1=2", "A='x"])
def test_wrong_env_files(line, folder):
    (folder / "env").write_text(f"OK=1\n{line}\n")
    with pytest.raises(ConfigError, match=r"env, line 2 must be NAME=VALUE"):
        read_env_file(folder / "env")


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--num_processes", "2", *PRETRAIN], ["Write --nproc-per-node N (of each node)"]),
        (["--config_file", "x", "--nnodes", "2", "s.py"], ["Write --config FILE after the verb"]),
        (["--nnodes", "2", *PRETRAIN], ["--rdzv-endpoint must say where several nodes meet"]),
        (["--nnodes", "2", "--rdzv-endpoint", "a:1", *PRETRAIN], ["--node-rank must be given for several nodes"]),
        (["--nnodes", "2", "--rdzv-endpoint", "a:1", "--node-rank", "2", *PRETRAIN], ["from 0 to --nnodes - 1, 1"]),
        (["--nnodes", "2:1", "--rdzv-endpoint", "a", *PRETRAIN], ["--nnodes must be a number", "must be HOST:PORT"]),
        (["--nproc-per-node", "0", *PRETRAIN], ["--nproc-per-node must be at least 1; found 0"]),
        (["--nproc-per-node", "2", "data", "merge"], ["must be 1 for a verb that is one process"]),
        (["--nproc-per-nod", "2", *PRETRAIN], ["did you mean --nproc-per-node?"]),
        (["--nproc-per-node", "2", "gone.py"], ["The script must be a file that exists"]),
        (["--nproc-per-node", "2", "--module", "gone_module"], ["must be one that Python can import"]),
        (["--preflight", "maybe", *PRETRAIN], ["--preflight must be one of auto, always, never, only"]),
        (["--master_port", "1", *PRETRAIN], ["for a verb, --rdzv-endpoint HOST:PORT"]),
    ],
)
def test_errors(words, messages, capsys):
    assert main(["launch", *words]) == 2
    err = capsys.readouterr().err
    assert all(message in err for message in messages), err


def test_a_file_of_a_verbs_name_is_a_script(capsys, folder):
    (folder / "pretrain").touch()
    out, err = shown(capsys, "--nproc-per-node", "2", "pretrain", "gpt")
    assert out.endswith("rank python pretrain gpt\n") and "pretrain is the script of that name here" in err


def test_an_elastic_range():
    assert NodeOptions(nnodes="1:2").elastic and not NodeOptions(nnodes="2").elastic
    assert NodeOptions(nnodes="1:2").node_range == (1, 2) and NodeOptions().node_range is None
