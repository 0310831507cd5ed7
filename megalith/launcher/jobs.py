"""Job scripts for Slurm and PBS: the lines that a person would write, to be read, changed and sent again.

A job starts one process on each node, `megalith launch`, which starts the node's processes. Before the time limit the
run is told to save and stop; then the job is queued again, and resumes.
"""

from __future__ import annotations

import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

from megalith.common.errors import ConfigError, problem
from megalith.common.files import write_text
from megalith.common.outputs import check as check_output
from megalith.common.outputs import writing
from megalith.config.flags.text import Words, flag
from megalith.launcher.local import LaunchOptions
from megalith.launcher.options import JobOptions, NodeOptions, seconds, words_of

SUBMIT = {"slurm": "sbatch", "pbs": "qsub"}
WIDTH = 100  # columns of a command in a script


def scheduler(job: JobOptions) -> str | None:
    """slurm or pbs, as the options choose; None where neither is asked for. Raises ConfigError for both."""
    if job.slurm and job.pbs:
        raise ConfigError(problem("--slurm", Words("--pbs too"), "must be given alone", "Leave one out"))
    return "slurm" if job.slurm else "pbs" if job.pbs else None


def problems(job: JobOptions, nodes: NodeOptions) -> Iterator[str]:
    """What keeps a job script from being written."""
    if nodes.hostfile:
        yield problem(
            "--hostfile", nodes.hostfile, "must be left out of a job, whose nodes are its own", "Leave it out"
        )
    if nodes.node_rank is not None:
        yield problem(
            "--node-rank", nodes.node_rank, "must be left out of a job, whose nodes know theirs", "Leave it out"
        )
    if job.pbs and job.cpus_per_task:
        rule = "must be left out with --pbs, which counts cores in --select"
        yield problem("--cpus-per-task", job.cpus_per_task, rule, f"Write --select ncpus={job.cpus_per_task}")
    if job.time is None:
        cure = "Write for example --time 4:00:00"
        yield problem("--time", Words("nothing"), "must be given, because the job has a time limit", cure)
    elif (limit := seconds(job.time)) is None:
        yield problem("--time", job.time, "must be HH:MM:SS or D-HH:MM:SS", "Write for example --time 4:00:00")
    elif limit <= job.signal_seconds:
        rule = f"must be shorter than --time, {limit} s: it is what the run has left to save and stop"
        yield problem("--signal-seconds", job.signal_seconds, rule, "Correct one of them")
    if job.container_image is None:
        for name in ("container", "container_mounts"):
            if getattr(job, name):
                rule = "must be given with --container-image"
                yield problem(flag(name), getattr(job, name), rule, "Name the image, or leave it out")
    if job.pbs and job.container == "pyxis":
        yield problem("--container", "pyxis", "must be apptainer with --pbs: pyxis is a part of Slurm", "Leave it out")
    if job.slurm and job.mpiexec:
        yield problem("--mpiexec", job.mpiexec, "must be left out with --slurm, which has srun", "Leave it out")
    if nodes.elastic and job.pbs:
        rule = "must be one number with --pbs, which ends a job whose node is lost"
        yield problem("--nnodes", nodes.nnodes, rule, "Write one number")


def without_gpus(job: JobOptions, nodes: NodeOptions) -> str | None:
    """A line on a job that asks for no accelerators by any option; None where it does."""
    named = f"{job.select} {job.directive}".lower()
    if (job.slurm and nodes.nproc_per_node) or "gpu" in named or "gres" in named:
        return None
    cure = "--nproc-per-node N" if job.slurm else "--select ngpus=N"
    return f"the job asks for no GPUs, and has those that its nodes have anyway, or a CPU; {cure} asks for N of them"


def script(
    job: JobOptions, nodes: NodeOptions, launch: LaunchOptions, words: Sequence[str], *,
    saved: Sequence[int], on_cpu: bool, name: str, folder: pathlib.Path, file: pathlib.Path, typed: Sequence[str],
) -> str:  # fmt: skip
    """The text of a job script.

    words: the verb or script with its own words. saved: exit statuses with which it has saved when told to stop, so
    that the same command resumes; none of a verb that does not. folder: where it runs. file: where the script will be.
    typed: the command that writes it.
    """
    kind = "slurm" if job.slurm else "pbs"
    lines_of = _slurm_lines(job, nodes, bool(saved), on_cpu, name) if kind == "slurm" else _pbs_lines(job, nodes, name)
    directives = [*lines_of, *(line.strip() for line in (job.directive or "").split(";") if line.strip())]
    mark = "#SBATCH" if kind == "slurm" else "#PBS"
    lines = ["#!/usr/bin/env bash", *(f"{mark} {line}" for line in directives)]
    written_by = shlex.join(["megalith", "launch", *typed]).replace("\n", " ")
    lines += ["", f"# Written by: {written_by}", f"# {SUBMIT[kind]} {shlex.quote(str(file))} sends it."]
    lines += ["", "set -euo pipefail", f"cd {shlex.quote(str(folder))}"]
    lines += [f"module load {shlex.quote(each.strip())}" for each in (job.modules or "").split(",") if each.strip()]
    if job.venv:
        lines += ["# shellcheck disable=SC1091 # it is on the cluster", f"source {shlex.quote(job.venv)}/bin/activate"]
    several = nodes.node_range is not None and nodes.node_range[1] > 1
    step = _starter(job, nodes, kind, several, folder, on_cpu) + _launch_words(job, nodes, launch, words)
    lines += ["", *(_stopping_step(job, kind, step, file, saved) if saved else [_broken(step)])]
    return "\n".join(lines) + "\n"


def _slurm_lines(job: JobOptions, nodes: NodeOptions, resumes: bool, on_cpu: bool, name: str) -> Iterator[str]:
    least, most = nodes.node_range or (1, 1)
    yield f"--job-name={_word(name)}"
    yield f"--nodes={least}" if least == most else f"--nodes={least}-{most}"
    yield "--ntasks-per-node=1"
    if nodes.nproc_per_node and not on_cpu:
        yield f"--gpus-per-node={nodes.nproc_per_node}"
    if job.cpus_per_task:
        yield f"--cpus-per-task={job.cpus_per_task}"
    yield f"--time={job.time}"
    for option, value in (("partition", job.queue), ("account", job.account), ("nodelist", job.nodelist)):
        if value:
            yield f"--{option}={value}"
    yield "--output=%x-%j.log"
    yield "--open-mode=append"
    if nodes.elastic:
        yield "--no-kill"
    if resumes:
        yield f"--signal=B:USR1@{job.signal_seconds}"
        yield "--requeue" if job.requeue else "--no-requeue"


def _pbs_lines(job: JobOptions, nodes: NodeOptions, name: str) -> Iterator[str]:
    count = (nodes.node_range or (1, 1))[1]
    each = f":{job.select}" if job.select else ""
    hosts = [host.strip() for host in (job.nodelist or "").split(",") if host.strip()]
    chosen = "+".join(f"1:host={host}{each}" for host in hosts) if hosts else f"{count}{each}"
    limit = seconds(job.time) or 0
    yield f"-N {_word(name)}"
    yield f"-l select={chosen}"
    yield f"-l walltime={limit // 3600:02}:{limit // 60 % 60:02}:{limit % 60:02}"
    if job.queue:
        yield f"-q {job.queue}"
    if job.account:
        yield f"-A {job.account}"
    yield "-j oe"
    yield "-r y" if job.requeue else "-r n"


def _word(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)[:60]


def _starter(
    job: JobOptions, nodes: NodeOptions, kind: str, several: bool, folder: pathlib.Path, on_cpu: bool
) -> list[str]:  # fmt: skip
    """The words before `megalith`: what starts one process on each node, in a container or not."""
    runner = job.container or ("pyxis" if kind == "slurm" else "apptainer") if job.container_image else None
    words: list[str] = []
    if kind == "slurm":
        words = ["srun", f"--kill-on-bad-exit={int(not nodes.elastic)}", *(["--no-kill"] if nodes.elastic else [])]
        words += [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []  # srun does not take sbatch's
        if runner == "pyxis":
            words += [f"--container-image={job.container_image}", f"--container-workdir={folder}"]
            words += [f"--container-mounts={job.container_mounts}"] if job.container_mounts else []
    elif several:
        count = (nodes.node_range or (1, 1))[1]
        words = shlex.split(job.mpiexec) if job.mpiexec else ["mpiexec", "-n", str(count), "-ppn", "1"]
    if runner == "apptainer":
        words += ["apptainer", "exec", *([] if on_cpu else ["--nv"])]
        words += ["--bind", job.container_mounts] if job.container_mounts else []
        words += ["--pwd", str(folder), job.container_image]
    return words


def _launch_words(job: JobOptions, nodes: NodeOptions, launch: LaunchOptions, words: Sequence[str]) -> list[str]:
    """`python -m megalith launch` with the options that act on a node, and what it starts."""
    found = ["python" if job.container_image or job.venv else sys.executable, "-m", "megalith", "launch"]
    # --nnodes 1 too: a script with no flag of nodes would be started as by Accelerate, and saved by nobody.
    return [*found, "--nnodes", nodes.nnodes or "1", *words_of(nodes, launch, ("nnodes",)), *words]


def _broken(words: Sequence[str], indent: str = "    ") -> str:
    """A command in lines: a flag and its values stay together."""
    lines, line = [], ""
    for word in map(shlex.quote, words):
        begins = word.startswith("-") or word in ("python", shlex.quote(sys.executable))
        if line and begins and len(line) + len(word) > WIDTH * 0.7:
            lines.append(line)
            line = indent + word
        else:
            line = f"{line} {word}" if line else word
    return " \\\n".join([*lines, line])


def _stopping_step(
    job: JobOptions, kind: str, step: Sequence[str], file: pathlib.Path, saved: Sequence[int]
) -> list[str]:  # fmt: skip
    """The lines that run the step, tell it to stop before the time limit, and queue the job again."""
    limit = (seconds(job.time) or 0) - job.signal_seconds
    mark = "limit=yes; " if job.requeue or kind == "pbs" else ""  # whether the time limit has stopped it
    if kind == "slurm":
        again = 'scontrol requeue "$SLURM_JOB_ID"'
        asked = [f"# Slurm sends USR1 to this script {job.signal_seconds} s before the time limit."]
        asked += [f"trap '{mark}stop' USR1"]
        watch: list[str] = []
    else:
        again = f"qsub {shlex.quote(str(file))}"
        asked = [f"# The time limit is {seconds(job.time)} s; the run is told to stop {job.signal_seconds} s before."]
        watch = [
            f"    if [[ -z $limit ]] && ((SECONDS >= {limit})); then",
            "        limit=yes",
            "        stop",
            "    fi",
        ]
    lines = ["# The run saves, stops and exits with status 0 when it is told to."]
    lines += ["step=''", *(["limit=''"] if mark else []), "# shellcheck disable=SC2329 # a trap calls it"]
    # Not TERM, upon which mpiexec ends the processes, and Slurm ends torchrun too (supervisor.py).
    lines += ['stop() { [[ -z $step ]] || kill -USR1 "$step" || true; }', "trap stop TERM", *asked]
    lines += ["", _broken(step) + " &", "step=$!"]
    lines += ['while kill -0 "$step" 2>/dev/null; do', *watch, "    sleep 1 &", "    wait $! || true", "done"]
    lines += ["status=0", 'wait "$step" || status=$?']
    if job.requeue:
        said = "143: SIGTERM came before the first step. " if 143 in saved else ""
        lines += [f"# {said}A run whose steps are all done ends at once."]
        ended = " || ".join(f"status == {status}" for status in saved)
        lines += [f"if [[ -n $limit ]] && (({ended})); then", f"    {again}", "fi"]
    return [*lines, 'exit "$status"']


def write(file: pathlib.Path, text: str, overwrite: bool) -> None:
    """Write the script, which can be run too. Raises ConfigError where the file exists and may not be replaced."""
    if file.exists() and not overwrite:
        raise ConfigError(f"--output: {file} exists already. Name another file, or add --overwrite to replace it.")
    check_output([file], overwrite=True)
    with writing(file, overwrite=overwrite):
        write_text(file, text)
    file.chmod(0o755)


def submit(kind: str, file: pathlib.Path) -> int:
    """Send the script; the exit status of sbatch or qsub, whose answer is shown."""
    if shutil.which(SUBMIT[kind]) is None:
        rule = f"must be given where {SUBMIT[kind]} is: on a login node of the cluster"
        raise ConfigError(problem("--submit", Words("none here"), rule, f"Type there: {SUBMIT[kind]} {file}"))
    return subprocess.run([SUBMIT[kind], str(file)], check=False).returncode
