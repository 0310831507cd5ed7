"""Which process this is among those that srun or mpiexec started: the rank variables of Slurm, Open MPI, PALS and PMI.

None of them says where the processes meet; the job's list of nodes does, or --rdzv-endpoint.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import zlib

from megalith.common import environment as variables
from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words

# What starts processes -> the variables in which it says of each: its rank, how many there are, its rank on its node,
# how many its node has, the node's rank, how many nodes there are. None: it does not say.
# SLURM_PROCID and SLURM_NTASKS are in batch scripts too, which are one process; SLURM_STEP_NUM_TASKS is srun's alone.
SOURCES: dict[str, tuple[str | None, ...]] = {
    "Open MPI's mpirun": (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
        None, None,
    ),
    "PALS's mpiexec": ("PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PMI_LOCAL_SIZE", "PALS_NODEID", None),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", None, None),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None, "SLURM_NODEID", "SLURM_STEP_NUM_NODES"),
}  # fmt: skip
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "PALS_APID", "PMIX_NAMESPACE")  # what all processes of a job have in common
PORT, PORTS = 29500, 1000  # a job's port is one of so many from there on


@dataclasses.dataclass(frozen=True)
class Task:
    """A process among `size`, started by `source`. nodes, node_rank: of the machines that they run on."""

    source: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int
    nodes: int


def current() -> Task | None:
    """This process among those of a launcher; None where no launcher started several, or one on a job's node.

    Raises ConfigError where two launchers' variables disagree, or say too little.
    """
    found = [(source, names, _numbers(names)) for source, names in SOURCES.items()]
    found = [each for each in found if each[2][0] is not None and (each[2][1] or 0) > 1]
    if not found:
        return None
    source, names, (rank, size, *_) = found[0]
    for other, other_names, (other_rank, other_size, *_) in found[1:]:
        if (rank, size) != (other_rank, other_size):
            what = f"The variables {names[0]} and {names[1]} of {source}"
            rule = f"must say what {other_names[0]} and {other_names[1]} of {other} say, {other_rank} of {other_size}"
            raise ConfigError(problem(what, Words(f"{rank} of {size}"), rule, "Unset those of the outer launcher"))
    merged = [next((numbers[at] for *_, numbers in found if numbers[at] is not None), None) for at in range(6)]
    _, _, local_rank, local_size, node_rank, nodes = merged
    local_size = local_size or _slurm_local_size(node_rank)
    if local_size is None and (local_rank is None or nodes is None):
        nodes = nodes or len(_nodes_of_pbs()) or 1
        if nodes > 1 and size != nodes:
            rule = "must say how many processes each node has (MPI_LOCALNRANKS, PMI_LOCAL_SIZE)"
            cure = "Start one process on each node: mpiexec -ppn 1 megalith launch --nproc-per-node N ..."
            raise ConfigError(problem(f"The variables of {source}", Words("nothing"), rule, cure))
        local_size = 1 if nodes > 1 else size
    local_size = local_size or -(-size // nodes)
    if local_rank is None:
        local_rank = rank % local_size
    nodes = nodes or -(-size // local_size)
    return Task(
        source, rank, size, local_rank, local_size, rank // local_size if node_rank is None else node_rank, nodes
    )


def _numbers(names: tuple[str | None, ...]) -> list[int | None]:
    return [None if name is None else variables.number(name) for name in names]


def _slurm_local_size(node_rank: int | None) -> int | None:
    """Processes of a node, of SLURM_STEP_TASKS_PER_NODE such as 4(x2),3: 4 on two nodes, then 3."""
    text = variables.variable("SLURM_STEP_TASKS_PER_NODE")
    if not text or node_rank is None:
        return None
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += int(times or 1) * [int(count)]
    return counts[node_rank] if node_rank < len(counts) else None


def _nodes_of_pbs() -> list[str]:
    """The nodes of PBS_NODEFILE, each once."""
    file = variables.variable("PBS_NODEFILE")
    try:
        return list(dict.fromkeys(pathlib.Path(file).read_text(encoding="utf-8").split())) if file else []
    except OSError:
        return []


def first_of_nodelist(text: str) -> str:
    """The first node of a list as Slurm writes it: node[07-09,12],b3 -> node07."""
    prefix, bracket, rest = text.partition("[")
    if not bracket or "," in prefix:
        return text.partition(",")[0]
    inside, _, suffix = rest.partition("]")
    return prefix + re.split(r"[,-]", inside)[0] + suffix.partition(",")[0]


def head_of_job() -> str | None:
    """The first node of the job, where its processes meet; None where no variable says it."""
    if nodes := variables.variable("SLURM_STEP_NODELIST") or variables.variable("SLURM_JOB_NODELIST"):
        return first_of_nodelist(nodes)
    nodes_of_pbs = _nodes_of_pbs()
    return nodes_of_pbs[0] if nodes_of_pbs else None


def job() -> str | None:
    """A text that all processes of this job have, and no other job; None outside of jobs."""
    return next((text for name in JOBS if (text := variables.variable(name))), None)


def port_of_job() -> int:
    """A port that all processes of a job choose alike."""
    text = job()
    return PORT if text is None else PORT + zlib.crc32(text.encode()) % PORTS


def meeting_point(task: Task) -> tuple[str, int]:
    """Host and port where the processes of `task` meet. Raises ConfigError where nothing says it."""
    host = "127.0.0.1" if task.nodes == 1 else head_of_job()
    if host is None:
        rule = f"must be given: {task.source} started processes on {task.nodes} nodes, and no variable names the first"
        cure = "Write --rdzv-endpoint HOST:29500, with the node of rank 0 for HOST"
        raise ConfigError(problem("--rdzv-endpoint", Words("nothing"), rule, cure))
    return host, port_of_job()
