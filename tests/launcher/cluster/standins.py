"""Stand-ins for launchers and schedulers: programs of their names that start what they are given on this machine."""

import os
import pathlib
import subprocess
import sys

from tests.toy import ROOT

FOREIGN = ("SLURM_", "PMI_", "PALS_", "OMPI_", "PBS_", "PMIX_", "MPI_LOCAL", "TORCHELASTIC_")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without a launcher's variables, and with these."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(FOREIGN) and name not in TORCHRUN}
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), kept["PATH"]])
    return kept | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


def rank_variables(source: str, rank: int, size: int, job: str) -> dict[str, str]:
    """What a launcher of this kind sets for a process, with all processes on one node."""
    r, n = str(rank), str(size)
    return {
        "srun": {
            "SLURM_JOB_ID": job, "SLURM_PROCID": r, "SLURM_STEP_NUM_TASKS": n, "SLURM_LOCALID": r, "SLURM_NODEID": "0",
            "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": n, "SLURM_STEP_NODELIST": "localhost",
        },
        "PMI": {"PMI_RANK": r, "PMI_SIZE": n, "MPI_LOCALRANKID": r, "MPI_LOCALNRANKS": n, "PBS_JOBID": job},
        "PALS": {
            "PALS_RANKID": r, "PALS_LOCAL_RANKID": r, "PALS_NODEID": "0", "PALS_APID": job, "PMI_RANK": r,
            "PMI_SIZE": n, "PMI_LOCAL_SIZE": n,
        },
        "OMPI": {
            "OMPI_COMM_WORLD_RANK": r, "OMPI_COMM_WORLD_SIZE": n, "OMPI_COMM_WORLD_LOCAL_RANK": r,
            "OMPI_COMM_WORLD_LOCAL_SIZE": n, "PMIX_NAMESPACE": job,
        },
    }[source]  # fmt: skip


def start_each(source: str, size: int, words: list[str], folder: pathlib.Path, job: str) -> list[subprocess.Popen]:
    """The processes that a launcher of this kind starts."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(words, cwd=folder, env=environment(**rank_variables(source, rank, size, job)), **pipes)
        for rank in range(size)
    ]
