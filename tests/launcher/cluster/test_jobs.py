"""Job scripts: shellcheck has nothing to say, every option is in them, and they run under stand-ins for schedulers."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from megalith.cli.main import main
from megalith.config.flags.loading import to_yaml
from megalith.launcher.options import seconds
from tests.launcher.cluster.scheduler import install
from tests.launcher.cluster.standins import environment
from tests.tiny import losses, tiny_config, write_corpus

PRETRAIN = ["pretrain", "gpt", "--recipe", "gpt3-175b", "--data-path", "0.3", "a b", "0.7", "c", "--name", "it's"]
TIME = ["--time", "4:00:00"]
FORMS = {  # name -> the words of launch
    "slurm": ["--slurm", *TIME, "--nnodes", "2", "--nproc-per-node", "8", *PRETRAIN],
    "slurm-one": ["--slurm", *TIME, *PRETRAIN],
    "slurm-elastic": ["--slurm", *TIME, "--nnodes", "1:2", "--max-restarts", "3", *PRETRAIN],
    "slurm-all": [
        "--slurm", *TIME, "--nnodes", "2", "--container-image", "nvcr.io#nvidia/pytorch:25.01", "--container-mounts",
        "/d:/d", "--account", "a", "--partition", "p", "--nodelist", "n[1-2]", "--modules", "cuda, mpi", "--venv", "/v",
        "--directive=--exclusive; --constraint=h100", "--no-requeue", "--env-file", "e", "--proxy", "http://p:1",
        *PRETRAIN,
    ],
    "slurm-apptainer": ["--slurm", *TIME, "--container", "apptainer", "--container-image", "x.sif", *PRETRAIN],
    "slurm-data": ["--slurm", *TIME, "data", "preprocess", "--input", "a b.jsonl", "--output-prefix", "x"],
    "pbs": ["--pbs", *TIME, "--nnodes", "2", "--nproc-per-node", "12", *PRETRAIN],
    "pbs-one": ["--pbs", *TIME, *PRETRAIN],
    "pbs-all": [
        "--pbs", *TIME, "--nnodes", "2", "--container-image", "x.sif", "--container-mounts", "/d", "--account", "a",
        "--queue", "q", "--select", "ngpus=4", "--nodelist", "n1,n2", "--mpiexec", "mpiexec --np 2 --ppn 1",
        "--directive=-l filesystems=home", *PRETRAIN,
    ],
    "pbs-data": ["--pbs", *TIME, "data", "merge", "--input", "a", "--output-prefix", "b"],
    "pbs-script": ["--pbs", *TIME, "--module", "torch.distributed.run", "--help"],
}  # fmt: skip


def written(capsys, words):
    assert main(["launch", "--dry-run", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_shellcheck(form, capsys, tmp_path):
    file = tmp_path / "job.sh"
    file.write_text(written(capsys, FORMS[form]))
    shellcheck = shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck")
    found = subprocess.run([shellcheck, str(file)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("form", FORMS)
def test_bash_reads_every_form(form, capsys):
    found = subprocess.run(
        ["bash", "-n"], input=written(capsys, FORMS[form]), capture_output=True, text=True, check=False
    )
    assert found.returncode == 0 and found.stderr == ""


def test_gpus_and_cores(capsys):
    assert main(["launch", "--dry-run", *FORMS["slurm-one"]]) == 0
    assert "the job asks for no GPUs" in capsys.readouterr().err
    for words in (FORMS["slurm"], FORMS["pbs-all"], FORMS["slurm-data"], [*FORMS["slurm-one"], "--device", "cpu"]):
        assert main(["launch", "--dry-run", *words]) == 0
        assert "no GPUs" not in capsys.readouterr().err
    text = written(capsys, ["--cpus-per-task", "96", *FORMS["slurm"]])
    assert "\n#SBATCH --cpus-per-task=96\n" in text
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=96" in " ".join(text.replace("\\\n", "").split())


def test_a_script_with_one_node_is_watched_and_not_sent_again_for_ever(capsys):
    text = written(capsys, FORMS["pbs-script"])
    assert "launch --nnodes 1 " in " ".join(text.replace("\\\n", "").split()) and "143" not in text
    assert "status == 0 || status == 143" in written(capsys, FORMS["pbs"])


def test_what_the_options_become(capsys):
    text = written(capsys, FORMS["slurm-all"])
    for line in (
        "--nodes=2", "--ntasks-per-node=1", "--time=4:00:00", "--account=a", "--partition=p", "--nodelist=n[1-2]",
        "--exclusive", "--constraint=h100", "--signal=B:USR1@300", "--no-requeue",
    ):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in text
    assert "module load cuda\nmodule load mpi\n" in text and "scontrol" not in text
    assert "--env-file e --proxy http://p:1" in " ".join(text.replace("\\\n", "").split())
    text = written(capsys, FORMS["pbs-all"])
    assert "\n#PBS -l select=1:host=n1:ngpus=4+1:host=n2:ngpus=4\n#PBS -l walltime=04:00:00\n" in text
    assert "mpiexec --np 2 --ppn 1 apptainer exec --nv --bind /d" in " ".join(text.replace("\\\n", "").split())
    assert "--gpus-per-node=8" in written(capsys, FORMS["slurm"])
    elastic = written(capsys, FORMS["slurm-elastic"])
    assert "#SBATCH --nodes=1-2\n" in elastic and "srun --kill-on-bad-exit=0 --no-kill" in elastic


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slurm", *PRETRAIN], "--time must be given"),
        (["--slurm", "--time", "soon", *PRETRAIN], "--time must be HH:MM:SS"),
        (["--slurm", "--time", "0:04:00", *PRETRAIN], "--signal-seconds must be shorter than --time, 240 s"),
        (["--slurm", "--pbs", *TIME, *PRETRAIN], "--slurm must be given alone"),
        (["--submit", *PRETRAIN], "--submit must be given with --slurm or --pbs"),
        (["--pbs", *TIME, "--container", "pyxis", "--container-image", "x", *PRETRAIN], "pyxis is a part of Slurm"),
        (["--pbs", *TIME, "--nnodes", "1:2", *PRETRAIN], "--nnodes must be one number with --pbs"),
        (["--pbs", *TIME, "--nnodes", "2", "data", "merge"], "--nnodes must be 1 for data, which is one process"),
        (["--slurm", *TIME, "--hostfile", "h", *PRETRAIN], "--hostfile must be left out of a job"),
        (["--slurm", *TIME, "--num_processes", "2", *PRETRAIN], "Write --nproc-per-node N"),
        (["--slurm", *TIME, "--submit", "--output", "new.slurm", *PRETRAIN], "--submit must be given where sbatch is"),
        (["--slurm", *TIME, "--output", "old", *PRETRAIN], "old exists already"),
    ],
)
def test_what_cannot_be(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").write_text("mine")
    assert main(["launch", *words]) == 2
    assert message in capsys.readouterr().err and (tmp_path / "old").read_text() == "mine"


def test_time_limits():
    texts = {"4:00:00": 14400, "30:00": 1800, "1-12:00:00": 129600, "2-0:30": 174600 - 0, "90": None, "1:2:3:4": None}
    texts["2-0:30"] = 2 * 86400 + 30 * 60
    assert {text: seconds(text) for text in texts} == texts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slurm", "pbs"])
def test_a_job_of_two_nodes_stops_is_queued_again_and_resumes(kind, tmp_path):
    """With the preflight under Slurm; each of the two "nodes" is one process."""
    config = tiny_config(
        write_corpus(str(tmp_path / "tiny")), str(tmp_path / "run"), train_iters=1000000, eval_iters=0,
        lr_decay_style="constant",
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    variables = environment() | install(tmp_path, tmp_path / "run" / "metrics.jsonl")
    words = [sys.executable, "-m", "megalith", "launch", f"--{kind}", "--submit", "--time", "1:00:00", "--nnodes", "2"]
    words += ["--nproc-per-node", "1", *(["--preflight", "never"] if kind == "pbs" else [])]
    words += ["pretrain", "gpt", "--config", "run.yaml"]
    done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=850)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert (tmp_path / "state" / "jobs").read_text() == "0 again\n0 again\n", said
    assert said.count("stopped after step") == 2 and "resuming after step" in said
    steps = len(losses(str(tmp_path / "run")))
    assert steps >= 10 and (tmp_path / "run/checkpoints/latest").read_text().strip() == f"iter_{steps:07}"
    assert ("preflight of 2 nodes" in said) == (kind == "slurm")
    assert ("all-reduce over 2 processes (gloo)" in said) == (kind == "slurm")


def test_a_job_of_data(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "1 2 3"}\n')
    variables = environment() | install(tmp_path, tmp_path / "none")
    words = [
        sys.executable,
        "-m",
        "megalith",
        "launch",
        "--pbs",
        "--submit",
        "--time",
        "0:10:00",
        "data",
        "inspect",
        "gone",
    ]
    done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1 and (tmp_path / "state/jobs").read_text() == "1 done\n", done.stderr
    assert done.stderr.splitlines()[-1].startswith("megalith: ")
