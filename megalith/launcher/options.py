"""The options of `megalith launch` for a verb: how many processes, where they meet, and the job that starts them."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection

from megalith.common.errors import problem
from megalith.config.flags.text import flag
from megalith.config.flags.values import Field, fields_of
from megalith.config.options import option, section
from megalith.launcher.local import LaunchOptions, launch_options


@section
class NodeOptions:
    """Processes and nodes (machines). The same command is given on each node, or to srun or mpiexec once."""

    nproc_per_node: int | None = option(
        None, "processes of this node (default: one for each accelerator, and one where there is none)", minimum=1
    )
    nnodes: str | None = option(None, "nodes: a number, or the fewest and the most, as in 1:2 (elastic; default: 1)")
    node_rank: int | None = option(
        None, "number of this node, counted from 0; node 0 is the one where all meet", minimum=0
    )
    rdzv_endpoint: str | None = option(None, "HOST:PORT of node 0, where the nodes meet (rendezvous)")
    hostfile: str | None = option(None, "file with a line `host slots=N` for each node; they are reached by ssh")
    env_file: str | None = option(None, "file with lines NAME=VALUE: environment variables of the processes")
    proxy: str | None = option(
        None, "URL of the proxy to the internet: http_proxy, https_proxy and the like are set to it"
    )
    preflight: str = option(
        "auto",
        "compare the nodes before the start (auto: where there are several), or do nothing else (only)",
        choices=("auto", "always", "never", "only"),
    )
    preflight_timeout: float = option(300.0, "seconds that the nodes wait for each other in the preflight", minimum=1.0)
    stop_with_stdin: bool = option(False, "stop as upon SIGTERM when standard input ends (a node that ssh started)")

    @property
    def node_range(self) -> tuple[int, int] | None:
        """The fewest and the most nodes; None where --nnodes is not given."""
        if self.nnodes is None:
            return None
        least, _, most = self.nnodes.partition(":")
        return int(least), int(most or least)

    @property
    def elastic(self) -> bool:
        """Whether nodes may come and go."""
        return self.node_range is not None and self.node_range[0] < self.node_range[1]


@section
class JobOptions:
    """The job of a cluster: `--slurm` or `--pbs` writes its script instead of starting anything."""

    slurm: bool = option(False, "write a job script for Slurm")
    pbs: bool = option(False, "write a job script for PBS")
    output: str | None = option(None, "file of the job script (default: NAME.slurm or NAME.pbs)")
    overwrite: bool = option(False, "replace that file")
    submit: bool = option(False, "send the job too (sbatch, qsub)")
    job_name: str | None = option(None, "name of the job (default: the run's or the verb's)")
    time: str | None = option(None, "time limit, HH:MM:SS or D-HH:MM:SS")
    queue: str | None = option(None, "queue (PBS) or partition (Slurm)", flags=("--partition",))
    account: str | None = option(None, "account or project that pays", flags=("--project",))
    directive: str | None = option(
        None, "further #SBATCH or #PBS lines, as in --directive='--exclusive; --constraint=h100'"
    )
    nodelist: str | None = option(None, "nodes to run on: as Slurm writes them, or for PBS with commas in between")
    select: str | None = option(None, "PBS: what each node must have, as in ngpus=8:ncpus=64")
    cpus_per_task: int | None = option(
        None, "Slurm: cores of each node, for all its processes (PBS: --select ncpus=N)", minimum=1
    )
    modules: str | None = option(None, "environment modules to load, with commas in between (module load)")
    venv: str | None = option(None, "virtual environment to activate")
    container_image: str | None = option(None, "container of all processes")
    container_mounts: str | None = option(None, "folders that the container sees, as in /data:/data,/home:/home")
    container: str | None = option(
        None, "what runs the container (default: pyxis with --slurm, else apptainer)", choices=("pyxis", "apptainer")
    )
    signal_seconds: int = option(
        300, "seconds before the time limit at which the run is told to save and stop", minimum=1
    )
    requeue: bool = option(True, "queue the job again where the time limit has stopped the run")
    mpiexec: str | None = option(
        None, "PBS: command that starts one process on each node (default: mpiexec -n NODES -ppn 1)"
    )


NNODES = re.compile(r"([1-9]\d*)(?::([1-9]\d*))?")
TIME = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d)(?::([0-5]?\d))?")


@functools.cache
def node_options() -> dict[str, Field]:
    """Every field of NodeOptions by its name."""
    return fields_of(NodeOptions(), "nodes")


@functools.cache
def job_options() -> dict[str, Field]:
    """Every field of JobOptions by its name."""
    return fields_of(JobOptions(), "job")


def words_of(nodes: NodeOptions, launch: LaunchOptions, left_out: Collection[str]) -> list[str]:
    """The options that are not the default, as they are typed. left_out: names of those that are not wanted."""
    words = list[str]()
    for fields, options in ((node_options(), nodes), (launch_options(), launch)):
        for name, field in fields.items():
            value = getattr(options, name)
            if value != field.default and name not in left_out:
                words += [flag(name)] if value is True else [flag(name), str(value)]
    return words


def nnodes_problem(text: str) -> str | None:
    """What is wrong with --nnodes; None where it can be read."""
    found = NNODES.fullmatch(text)
    if found and int(found[2] or found[1]) >= int(found[1]):
        return None
    rule = "must be a number of nodes, or the fewest and the most"
    return problem("--nnodes", text, rule, "Write for example --nnodes 2, or --nnodes 1:2")


def endpoint(text: str) -> tuple[str, int] | None:
    """Host and port of --rdzv-endpoint; None where it cannot be read."""
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        return None
    return host.strip("[]"), int(port)


def endpoint_problem(text: str) -> str | None:
    """What is wrong with --rdzv-endpoint; None where it can be read."""
    if endpoint(text):
        return None
    return problem("--rdzv-endpoint", text, "must be HOST:PORT of node 0", "Write for example node01:29500")


def seconds(text: str) -> int | None:
    """Seconds of a time limit such as 4:00:00, 30:00 (minutes) or 1-12:00:00; None where it cannot be read.

    H:MM after D- are hours and minutes, as in Slurm.
    """
    if (found := TIME.fullmatch(text)) is None:
        return None
    days, first, second, third = (int(part) if part else None for part in found.groups())
    if third is None and days is None:
        return 60 * first + second
    return 86400 * (days or 0) + 3600 * first + 60 * second + (third or 0)
