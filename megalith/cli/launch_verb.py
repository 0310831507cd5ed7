"""megalith launch of a verb, or of a script with flags of nodes or jobs: what is checked, and which way it starts."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from megalith.common.errors import ConfigError
from megalith.config.flags.flags import CommandLine
from megalith.config.flags.text import Problem, fail, flag
from megalith.config.flags.values import Field
from megalith.launcher import accelerate_config, local, options, processes, tasks
from megalith.launcher.accelerate_config import typed
from megalith.launcher.local import LaunchOptions, launch_options
from megalith.launcher.options import JobOptions, NodeOptions, job_options, node_options
from megalith.launcher.supervisor import Supervisor

SEVERAL = ("pretrain", "generate", "serve")  # verbs that run as several processes
ONE = ("data", "demo", "checkpoint", "parity", "ask", "config")  # those that are one
INSTEAD = {  # flags of Accelerate -> those for a verb
    "num_processes": "--nproc-per-node N (of each node)", "num_machines": "--nnodes N", "machine_rank": "--node-rank N",
    "main_process_ip": "--rdzv-endpoint HOST:PORT", "main_process_port": "--rdzv-endpoint HOST:PORT",
    "rdzv_backend": "nothing: nodes meet by c10d", "use_cpu": "--device cpu after the verb",
    "mixed_precision": "--bf16 or --fp16 after the verb", "config_file": "--config FILE after the verb",
}  # fmt: skip


def is_meant(reading: CommandLine) -> bool:
    """Whether a verb is launched, or a script with flags that Accelerate does not have."""
    names = {**node_options(), **job_options()}.keys()
    return _is_verb(reading) or not names.isdisjoint(reading.values)


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
    launch_values = LaunchOptions(**_values(launch_options(), reading, problems))
    problems += _conflicts(reading, nodes)
    verb = reading.words[0] if _is_verb(reading) else None
    if verb is None and (text := local.script_problem(launch_values, reading.words)):
        problems.append(Problem((), text.replace("--num_processes", "--nproc-per-node")))
    fail(each.text for each in problems)
    for line in reading.notices:
        _tell(line)
    several, on_cpu = verb in (*SEVERAL, None), _on_cpu(reading.words)
    plan, lines = processes.make_plan(nodes, several, on_cpu)
    words = _words_of_process(verb, launch_values, reading.words)
    added, more = processes.variables_of_options(nodes, launch_values, plan)
    for line in [*lines, *more]:
        _tell(line)
    processes.check_port(plan)
    if plan.task or (not plan.several_nodes and plan.processes == 1 and not launch_values.max_restarts):
        if reading.values.get("dry_run"):
            print(local.text(words, added))
            return 0
        local.start(words, added)
    run_id = tasks.job() or "megalith"
    if reading.values.get("dry_run"):
        print(local.text(processes.torchrun(plan, launch_values, words, run_id, None), added))
        return 0
    with tempfile.TemporaryDirectory(prefix="megalith-launch-") as log_dir:
        command = processes.torchrun(plan, launch_values, words, run_id, log_dir)
        supervisor = Supervisor(pathlib.Path(launch_values.log_dir or log_dir))
        return supervisor.run(command, added, nodes.stop_with_stdin)


def _tell(line: str) -> None:
    print(f"megalith: {line}", file=sys.stderr)


def _values(fields: Mapping[str, Field], reading: CommandLine, problems: list[Problem]) -> dict[str, Any]:
    """The typed values of those fields that are given."""
    found = {}
    for name, field in fields.items():
        if name in reading.values:
            value, failure = typed(field, reading.values[name], flag(name))
            problems += [failure] if failure else []
            found |= {} if value is None else {name: value}
    return found


def _conflicts(reading: CommandLine, nodes: NodeOptions) -> list[Problem]:
    """What cannot be given here: flags of Accelerate, and values that cannot be read."""
    found = []
    for name in reading.values:
        if name in accelerate_config.keys() or name == "config_file":
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
