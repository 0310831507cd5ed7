"""Rank variables of srun and mpiexec: which process this is, where all meet; each kind starts a run of two."""

import json
import sys

import pytest

from megalith.common.errors import ConfigError
from megalith.config.flags.loading import to_yaml
from megalith.launcher import tasks
from tests.launcher.cluster.standins import FOREIGN, rank_variables, start_each
from tests.tiny import losses, tiny_config, write_corpus

KINDS = ("srun", "PMI", "PALS", "OMPI")
SCRIPT = """\
import json, os
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
print(json.dumps({name: os.environ[name] for name in names}))
raise SystemExit(5 if os.environ["RANK"] == "1" else 0)
"""


@pytest.fixture
def variables(monkeypatch):
    """`variables(NAME=value, ...)`: the variables of launchers are these alone."""

    def put(**values):
        import os

        for name in [name for name in os.environ if name.startswith(FOREIGN)]:
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    put()
    return put


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_read(variables, kind):
    variables(**rank_variables(kind, 1, 4, "77"))
    task = tasks.current()
    assert (task.rank, task.size, task.local_rank, task.local_size) == (1, 4, 1, 4)
    assert (task.node_rank, task.nodes) == (0, 1) and tasks.job() == "77"
    host, port = tasks.meeting_point(task)
    assert host == "127.0.0.1" and tasks.PORT <= port < tasks.PORT + tasks.PORTS


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_is_no_task(variables, kind):
    variables(**rank_variables(kind, 0, 1, "77"))
    assert tasks.current() is None


def test_a_batch_script_is_no_task(variables):
    variables(SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_NTASKS="16", SLURM_JOB_NODELIST="a[01-02]")
    assert tasks.current() is None


def test_uneven_nodes_of_slurm(variables):
    step = {"SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}
    step |= {"SLURM_STEP_NODELIST": "gpu[07-08,11]", "SLURM_JOB_ID": "1"}
    variables(SLURM_PROCID="9", SLURM_LOCALID="1", SLURM_NODEID="2", **step)
    task = tasks.current()
    assert (task.local_size, task.node_rank, task.nodes) == (3, 2, 3)
    assert tasks.meeting_point(task)[0] == "gpu07"


def test_one_process_of_each_node(variables, tmp_path):
    (tmp_path / "nodes").write_text("x1\nx1\nx2\nx2\n")
    variables(PMI_RANK="1", PMI_SIZE="2", PBS_NODEFILE=str(tmp_path / "nodes"), PBS_JOBID="5.host")
    task = tasks.current()
    assert (task.local_size, task.node_rank, task.nodes) == (1, 1, 2) and tasks.meeting_point(task)[0] == "x1"


def test_srun_with_pmi2_says_it_twice(variables):
    variables(**rank_variables("srun", 1, 2, "3"), PMI_RANK="1", PMI_SIZE="2")
    assert tasks.current().local_size == 2


def test_launchers_that_disagree(variables):
    variables(**rank_variables("srun", 1, 8, "3"), PMI_RANK="1", PMI_SIZE="2")
    with pytest.raises(ConfigError, match=r"must say what SLURM_PROCID and SLURM_STEP_NUM_TASKS of srun say, 1 of 8"):
        tasks.current()


def test_nodes_that_nobody_names(variables):
    variables(
        OMPI_COMM_WORLD_RANK="0",
        OMPI_COMM_WORLD_SIZE="4",
        OMPI_COMM_WORLD_LOCAL_RANK="0",
        OMPI_COMM_WORLD_LOCAL_SIZE="2",
    )
    with pytest.raises(ConfigError, match="started processes on 2 nodes, and no variable names the first"):
        tasks.meeting_point(tasks.current())


@pytest.mark.parametrize(
    ("text", "first"),
    [("a1", "a1"), ("a1,b2", "a1"), ("a[01-03,7],b", "a01"), ("x,a[1-2]", "x"), ("n[7,9]-ib,m", "n7-ib")],
)
def test_first_of_nodelist(text, first):
    assert tasks.first_of_nodelist(text) == first


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_of_each_kind(kind, tmp_path):
    (tmp_path / "s.py").write_text(SCRIPT)
    words = [sys.executable, "-m", "megalith", "launch", "--preflight", "never", "s.py"]
    processes = start_each(kind, 2, words, tmp_path, "12")
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 5], outputs
    first, second = (json.loads(out) for out, _ in outputs)
    assert (first["RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "1", "1")
    assert first["WORLD_SIZE"] == second["LOCAL_WORLD_SIZE"] == "2" and first["MASTER_PORT"] == second["MASTER_PORT"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_of_each_kind_train(kind, tmp_path):
    config = tiny_config(write_corpus(str(tmp_path / "tiny")), str(tmp_path / "run"), train_iters=4, eval_iters=0)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    words = [sys.executable, "-m", "megalith", "launch", "pretrain", "gpt", "--config", "run.yaml"]
    processes = start_each(kind, 2, words, tmp_path, kind)
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(losses(str(tmp_path / "run"))) == 4 and "2 process" in outputs[0][0]
