"""From the options and the variables of srun or mpiexec to the processes of this node: what starts, and with what."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

from megalith.common import environment as variables
from megalith.common.errors import ConfigError, problem
from megalith.config.environment import cannot_listen
from megalith.config.flags.text import Words, flag
from megalith.launcher import tasks
from megalith.launcher.local import TORCHRUN, LaunchOptions
from megalith.launcher.options import NodeOptions, endpoint

ACCELERATORS = ("nvidia[0-9]*", "dri/renderD*", "kfd", "accel/accel*", "dxg")  # below /dev, where Linux has one
COUNT = (
    "import torch; a = torch.accelerator; "
    "print(a.device_count() if a.is_available() and a.current_accelerator().type in ('cuda', 'xpu') else 0)"
)
PROXY = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The processes of this node among those of a run.

    task: this process, where srun or mpiexec started one for each process of the run; then nothing else is started.
    nodes: the fewest and the most. meeting: host and port of node 0; None for one node.
    """

    processes: int
    nodes: tuple[int, int] = (1, 1)
    node_rank: int | None = 0
    meeting: tuple[str, int] | None = None
    task: tasks.Task | None = None

    @property
    def world_size(self) -> int:
        """Processes of the run where all nodes are there and alike."""
        return self.task.size if self.task else self.processes * self.nodes[1]

    @property
    def several_nodes(self) -> bool:
        """Whether there may be more than one node."""
        return self.nodes[1] > 1


def accelerators() -> int:
    """Accelerators that this machine's processes can use; torch counts them, in a process of its own."""
    if sys.platform == "linux" and not any(any(pathlib.Path("/dev").glob(pattern)) for pattern in ACCELERATORS):
        return 0
    found = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=False)
    return int(found.stdout.split()[-1]) if found.returncode == 0 and found.stdout.strip() else 0


def make_plan(options: NodeOptions, several: bool, on_cpu: bool) -> tuple[Plan, list[str]]:
    """The processes of this node, and lines on what nobody typed.

    several: whether what is started can be several processes. on_cpu: whether it leaves accelerators alone.
    Raises ConfigError where options and variables cannot work together.
    """
    task, lines = tasks.current(), []
    nodes, meeting, node_rank = options.node_range, endpoint(options.rdzv_endpoint or ""), None
    if task:
        lines.append(f"{task.source} started {task.size} processes on {task.nodes} nodes; this is rank {task.rank}")
        if nodes and not nodes[0] <= task.nodes <= nodes[1]:
            rule = f"must allow the number of nodes on which {task.source} started this command, {task.nodes}"
            raise ConfigError(problem("--nnodes", options.nnodes, rule, "Leave it out, or correct one of them"))
        if options.node_rank not in (None, task.node_rank):
            rule = f"must be {task.node_rank}, which {task.source} says"
            raise ConfigError(problem("--node-rank", options.node_rank, rule, "Leave it out"))
        nodes, node_rank, meeting = (
            nodes or (task.nodes, task.nodes),
            task.node_rank,
            meeting or tasks.meeting_point(task),
        )
        if not several:
            rule = f"must be started once; {task.source} started it {task.size} times"
            raise ConfigError(problem("A verb that is one process", Words("several"), rule, "Start it by itself"))
        if task.local_size > 1:
            _check_task(options, task)
            return Plan(task.local_size, (task.nodes, task.nodes), node_rank, meeting, task), lines
    nodes = nodes or (1, 1)
    if nodes[1] == 1:
        node_rank, meeting = 0, None if task is None else meeting
    elif node_rank is None:
        node_rank = options.node_rank
    if nodes[1] > 1 and not meeting:
        cure = "Write --rdzv-endpoint HOST:29500 on all nodes, with the name or address of node 0 for HOST"
        raise ConfigError(problem("--rdzv-endpoint", Words("nothing"), "must say where several nodes meet", cure))
    if nodes[1] > 1 and node_rank is None:
        cure = "Give each node its own, --node-rank 0 to the one of --rdzv-endpoint"
        raise ConfigError(problem("--node-rank", Words("nothing"), "must be given for several nodes", cure))
    if node_rank is not None and node_rank >= nodes[1]:
        rule = f"must be from 0 to --nnodes - 1, {nodes[1] - 1}"
        raise ConfigError(problem("--node-rank", node_rank, rule, "Correct one of them"))
    if not several:
        if (options.nproc_per_node or 1) > 1 or nodes[1] > 1:
            given = "--nnodes" if nodes[1] > 1 else "--nproc-per-node"
            cure = "Leave it out; pretrain, finetune, generate, evaluate, index, serve and scripts run as several"
            found = options.nnodes if nodes[1] > 1 else options.nproc_per_node
            raise ConfigError(problem(given, found or nodes[1], "must be 1 for a verb that is one process", cure))
        return Plan(1), lines
    processes = options.nproc_per_node
    if processes is None:
        processes = 1 if on_cpu else accelerators() or 1
        lines.append(
            f"--nproc-per-node is not given: {processes} process{'es' * (processes > 1)}"
            + ("" if on_cpu else ", one for each accelerator" if processes > 1 else "")
        )
    return Plan(processes, nodes, node_rank, meeting), lines


def _check_task(options: NodeOptions, task: tasks.Task) -> None:
    """Raise ConfigError for what cannot be where each task is a process of the run."""
    if options.nproc_per_node not in (None, task.local_size):
        rule = f"must be {task.local_size}, the processes that {task.source} started on this node"
        cure = "Leave it out, or start one process on each node (srun --ntasks-per-node 1, mpiexec -ppn 1)"
        raise ConfigError(problem("--nproc-per-node", options.nproc_per_node, rule, cure))
    if options.elastic:
        rule = f"must be one number where {task.source} starts each process"
        cure = "Start one process on each node (srun --ntasks-per-node 1, mpiexec -ppn 1)"
        raise ConfigError(problem("--nnodes", options.nnodes, rule, cure))


def check_port(plan: Plan) -> None:
    """Raise ConfigError where this node is the one that all meet at, and cannot listen at the port given."""
    first = plan.task.rank == 0 if plan.task else plan.node_rank == 0
    if plan.meeting and first and plan.world_size > 1 and (reason := cannot_listen(plan.meeting[1])):
        rule = f"must name a port at which node 0 can listen for the others ({reason})"
        raise ConfigError(
            problem("--rdzv-endpoint", Words("{}:{}".format(*plan.meeting)), rule, "Give another one to all nodes")
        )


def torchrun(plan: Plan, launch: LaunchOptions, words: Sequence[str], run_id: str, log_dir: str | None) -> list[str]:
    """The command that starts the processes of this node. words: what each of them runs."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    if plan.meeting is None or not plan.several_nodes:
        command.append("--standalone")
    else:
        host, port = plan.meeting
        least, most = plan.nodes
        is_host = f"is_host={'true' if plan.node_rank == 0 else 'false'}"
        rules = ",".join([is_host, *([launch.rdzv_conf] if launch.rdzv_conf else [])])
        command += ["--nnodes", f"{least}:{most}" if least < most else str(most), "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", run_id, "--rdzv-conf", rules]
        if host in ("127.0.0.1", "localhost"):  # nodes of a simulation: their own names may lead elsewhere
            command += ["--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(plan.processes)]
    for name in TORCHRUN:
        value = getattr(launch, name)
        if value is not None and name not in ("rdzv_conf", "log_dir"):
            command += [flag(name), str(value)]
    if folder := log_dir or launch.log_dir:
        command += ["--log-dir", folder]
    return [*command, "-m", "megalith.launcher.rank", *words]


def variables_of_task(plan: Plan) -> dict[str, str]:
    """The variables that torchrun would set, for a process that srun or mpiexec started."""
    task, (host, port) = plan.task, plan.meeting
    return {
        "RANK": str(task.rank),
        "WORLD_SIZE": str(task.size),
        "LOCAL_RANK": str(task.local_rank),
        "LOCAL_WORLD_SIZE": str(task.local_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }


def variables_of_options(options: NodeOptions, launch: LaunchOptions, plan: Plan) -> tuple[dict[str, str], list[str]]:
    """The environment variables that are set for the processes, and a line on each that nobody asked for."""
    from_file = read_env_file(pathlib.Path(options.env_file)) if options.env_file else {}
    found, lines = dict(from_file), list[str]()
    if options.proxy:
        found |= dict.fromkeys(PROXY, options.proxy)
    if launch.num_cpu_threads_per_process is not None:
        found["OMP_NUM_THREADS"] = str(launch.num_cpu_threads_per_process)
    elif plan.processes > 1 and not variables.threads() and "OMP_NUM_THREADS" not in found:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        bound = plan.task is not None and cores < (os.cpu_count() or 1)  # srun gave each process cores of its own
        found["OMP_NUM_THREADS"] = str(max(1, cores // (1 if bound else plan.processes)))
        lines.append(
            f"OMP_NUM_THREADS is {found['OMP_NUM_THREADS']}: {plan.processes} processes, {cores} cores"
            f"{' for each' * bound}; --num-cpu-threads-per-process says another"
        )
    if plan.task:
        found |= variables_of_task(plan)
    set_here = [f"{name}={value}" for name, value in found.items() if name not in from_file]
    shown = set_here + [f"{name} (of {options.env_file})" for name in from_file]  # whose values may be secrets
    if shown and (plan.task is None or plan.task.rank == 0):
        lines.append(f"environment variables that are set: {', '.join(shown)}")
    return found, lines


def read_env_file(file: pathlib.Path) -> dict[str, str]:
    """The variables of a file with lines NAME=VALUE, as a shell reads them. Raises ConfigError for another line."""
    found = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        rule = f"must name a readable file ({why})"
        raise ConfigError(problem("--env-file", str(file), rule, "Correct the path")) from error
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            words = [line, "is not closed"]
        words = words[1:] if words[:1] == ["export"] else words
        name, equals, value = words[0].partition("=") if words else ("", "", "")
        if words and (len(words) > 1 or not equals or not name.isidentifier()):
            cure = "Correct it; a value with spaces is put into quotes, and variables in it are not replaced"
            raise ConfigError(problem(f"{file}, line {number}", line, "must be NAME=VALUE", cure))
        if words:
            found[name] = value
    return found
