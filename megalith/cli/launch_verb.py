"""megalith launch of a verb, or of a script with flags of nodes or jobs: what is checked, and which way it starts."""

from __future__ import annotations

import importlib.util
import itertools
import pathlib
import shlex
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.flags import CommandLine
from megalith.config.flags.text import Problem, Words, fail, flag
from megalith.config.flags.values import Field
from megalith.launcher import accelerate_config, hosts, jobs, local, options, processes, tasks
from megalith.launcher.accelerate_config import typed
from megalith.launcher.local import LaunchOptions, launch_options
from megalith.launcher.options import JobOptions, NodeOptions, job_options, node_options
from megalith.launcher.supervisor import Supervisor

SEVERAL = ("pretrain", "finetune", "generate", "evaluate", "index", "serve")  # verbs that run as several processes
RESUMED = ("pretrain", "finetune")  # those that save upon SIGTERM, and go on by the same command
ONE = ("data", "demo", "checkpoint", "parity", "ask", "config")  # those that are one
INSTEAD = {  # flags of Accelerate -> those for a verb
    "num_processes": "--nproc-per-node N (of each node)", "num_machines": "--nnodes N", "machine_rank": "--node-rank N",
    "main_process_ip": "--rdzv-endpoint HOST:PORT", "main_process_port": "--rdzv-endpoint HOST:PORT",
    "rdzv_backend": "nothing: nodes meet by c10d", "use_cpu": "--device cpu after the verb",
    "mixed_precision": "--bf16 or --fp16 after the verb", "config_file": "--config FILE after the verb",
}  # fmt: skip


def is_meant(reading: CommandLine) -> bool:
    """Whether a verb is started, or a script with flags that Accelerate does not have.

    Or a script that srun or mpiexec starts several times, without any flag of Accelerate: each would train by itself.
    """
    names = {**node_options(), **job_options()}.keys()
    if _is_verb(reading) or not names.isdisjoint(reading.values):
        return True
    return {*accelerate_config.keys(), "config_file"}.isdisjoint(reading.values) and tasks.current() is not None


def _is_verb(reading: CommandLine) -> bool:
    """Whether the first word is a verb. A script of that name is a script, which a line says."""
    as_script = {"module", "no_python"} & reading.values.keys()
    if not reading.words or reading.words[0] not in (*SEVERAL, *ONE) or as_script:
        return False
    if pathlib.Path(reading.words[0]).is_file():
        reading.notices.append(f"{reading.words[0]} is the script of that name here, not the verb; ./NAME says so too")
        return False
    return True


def launch(reading: CommandLine) -> int:
    """Check what is given and start it, write its job script, or print what would start; the exit status."""
    problems = list(reading.problems)
    nodes = NodeOptions(**_values(node_options(), reading, problems))
    job = JobOptions(**_values(job_options(), reading, problems))
    start = LaunchOptions(**_values(launch_options(), reading, problems))
    problems += _conflicts(reading, nodes)
    verb = reading.words[0] if _is_verb(reading) else None
    if verb is None and (text := local.script_problem(start, reading.words)):
        problems.append(Problem((), text.replace("--num_processes", "--nproc-per-node")))
    kind, on_cpu = jobs.scheduler(job), _on_cpu(reading.words)
    if kind:
        problems += [Problem((), text) for text in jobs.problems(job, nodes)]
    elif given := [flag(name) for name in job_options() if name in reading.values]:
        text = problem(given[0], Words("no job"), "must be given with --slurm or --pbs", "Add one, or leave it out")
        problems.append(Problem((), text))
    fail(each.text for each in problems)
    for line in dict.fromkeys(reading.notices):
        _tell(line)
    dry = bool(reading.values.get("dry_run"))
    if kind:
        _one_process(verb, nodes)
        return _write_job(job, nodes, start, reading, verb, on_cpu, dry)
    if nodes.hostfile:
        _one_process(verb, nodes)
        return _on_hosts(nodes, start, reading.words, dry)
    plan, lines = processes.make_plan(nodes, verb in (*SEVERAL, None), on_cpu)
    words = _words_of_process(verb, start, reading.words)
    added, more = processes.variables_of_options(nodes, start, plan)
    for line in [*lines, *more]:
        _tell(line)
    in_job = tasks.job() is not None and verb in (*RESUMED, None)  # whose job script sends USR1, for the supervisor
    watched = plan.several_nodes or plan.processes > 1 or start.max_restarts or nodes.stop_with_stdin or in_job
    alone = plan.task is not None or not watched
    run_id = tasks.job() or "megalith"
    if dry:
        command = words if alone else processes.torchrun(plan, start, words, run_id, None)
        from_file = processes.read_env_file(pathlib.Path(nodes.env_file)) if nodes.env_file else {}  # maybe secrets
        if from_file:
            print(f"# and the variables of {nodes.env_file}")
        print(local.text(command, {name: value for name, value in added.items() if name not in from_file}))
        return 0
    processes.check_port(plan)
    several = plan.several_nodes if plan.task is None else plan.task.nodes > 1
    if nodes.preflight in ("always", "only") or (nodes.preflight == "auto" and several and not nodes.elastic):
        from megalith.workflows import preflight  # here, because few starts need it

        preflight.run(plan, start, reading.words, added, nodes.preflight_timeout, on_cpu, print)
        if nodes.preflight == "only":
            return 0
    if alone:
        local.start(words, added)
    with tempfile.TemporaryDirectory(prefix="megalith-launch-") as log_dir:
        if start.log_dir:  # a folder of this launcher's own: in another's records are processes that it must not signal
            pathlib.Path(start.log_dir).mkdir(parents=True, exist_ok=True)
            log_dir = tempfile.mkdtemp(prefix=f"{socket.gethostname()}-", dir=start.log_dir)
        command = processes.torchrun(plan, start, words, run_id, log_dir)
        return Supervisor(pathlib.Path(log_dir)).run(command, added, nodes.stop_with_stdin)


def _one_process(verb: str | None, nodes: NodeOptions) -> None:
    """Raise ConfigError where a verb that is one process is to have more."""
    if verb in ONE and (nodes.node_range not in (None, (1, 1)) or (nodes.nproc_per_node or 1) > 1):
        given = "--nproc-per-node" if (nodes.nproc_per_node or 1) > 1 else "--nnodes"
        cure = "Leave it out; data preprocess takes --workers, and --engine ray for several nodes"
        found = nodes.nproc_per_node if given == "--nproc-per-node" else nodes.nnodes
        raise ConfigError(problem(given, found, f"must be 1 for {verb}, which is one process", cure))


def _write_job(
    job: JobOptions, nodes: NodeOptions, start: LaunchOptions, reading: CommandLine, verb: str | None, on_cpu: bool,
    dry: bool,
) -> int:  # fmt: skip
    """Write the job script and send it where --submit asks for it; the exit status."""
    name = job.job_name or _name(reading.words)
    kind = jobs.scheduler(job) or ""
    file = pathlib.Path(job.output or f"{name}.{kind}").absolute()
    if verb in (*SEVERAL, None) and not on_cpu and (line := jobs.without_gpus(job, nodes)):
        _tell(line)
    as_module = ["--module"] if start.module else ["--no-python"] if start.no_python else []
    text = jobs.script(
        job, nodes, LaunchOptions(**{**vars(start), "module": False, "no_python": False}), [*as_module, *reading.words],
        saved={**dict.fromkeys(RESUMED, (0, 143)), None: (0,)}.get(verb, ()), on_cpu=on_cpu or verb in ONE, name=name,
        folder=pathlib.Path.cwd(), file=file, typed=reading.typed,
    )  # fmt: skip
    if dry:
        print(text, end="")
        return 0
    jobs.write(file, text, job.overwrite)
    if job.submit:
        return jobs.submit(kind, file)
    print(f"wrote {file}; to send it:\n  {jobs.SUBMIT[kind]} {shlex.quote(str(file))}")
    return 0


def _name(words: Sequence[str]) -> str:
    """A name for a job: the run's or its recipe's, else the first words."""
    for name in ("--name", "--recipe"):
        if name in words[:-1]:
            return words[words.index(name) + 1]
    plain = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    return "-".join(pathlib.PurePath(word).stem for word in plain[:2]) or "megalith"


def _on_hosts(nodes: NodeOptions, start: LaunchOptions, words: Sequence[str], dry: bool) -> int:
    """Start a launch on every host of the hostfile; the exit status of the first that fails."""
    found = hosts.read_hostfile(pathlib.Path(nodes.hostfile or ""))
    hosts.check(nodes)
    commands = hosts.commands(found, nodes, start, words, pathlib.Path.cwd())
    if dry:
        print("\n".join(shlex.join(command) for command in commands))
        return 0
    return hosts.run(found, commands)


def _tell(line: str) -> None:
    print(f"megalith: {line}", file=sys.stderr)


def _values(fields: Mapping[str, Field], reading: CommandLine, problems: list[Problem]) -> dict[str, Any]:
    """The typed values of those fields that are given."""
    found = dict[str, Any]()
    for name, field in fields.items():
        if name in reading.values:
            value, failure = typed(field, reading.values[name], flag(name))
            problems += [failure] if failure else []
            found |= {} if value is None else {name: value}
    return found


def _conflicts(reading: CommandLine, nodes: NodeOptions) -> list[Problem]:
    """What cannot be given here: flags of Accelerate, and values that cannot be read."""
    found, known = [], {*accelerate_config.keys()}
    for name in reading.values:
        if name in known or name == "config_file":
            cure = f"Write {INSTEAD[name]}" if name in INSTEAD else "Leave it out"
            found.append(
                Problem((), f"{flag(name)} configures scripts for Accelerate, and has no meaning with a verb or with "
                f"flags of nodes and jobs. {cure}.")
            )  # fmt: skip
    texts = [options.nnodes_problem(nodes.nnodes) if nodes.nnodes else None]
    texts.append(options.endpoint_problem(nodes.rdzv_endpoint) if nodes.rdzv_endpoint else None)
    return [*found, *(Problem((), text) for text in texts if text)]


def _on_cpu(words: Sequence[str]) -> bool:
    """Whether the words of a verb choose the CPU: --device cpu."""
    return any(
        word == "--device=cpu" or (word == "--device" and words[at + 1 : at + 2] == ["cpu"])
        for at, word in enumerate(words)
    )


def _words_of_process(verb: str | None, launch_values: LaunchOptions, words: Sequence[str]) -> list[str]:
    """What each process runs."""
    if verb:
        return [sys.executable, "-m", "megalith", *words]
    if launch_values.no_python:
        return list(words)
    if launch_values.module:
        if importlib.util.find_spec(words[0].partition(".")[0]) is None:
            raise ConfigError(f"The module {words[0]} must be one that Python can import; found none of that name.")
        return [sys.executable, "-m", *words]
    return [sys.executable, *words]
