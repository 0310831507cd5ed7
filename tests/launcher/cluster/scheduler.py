"""Stand-ins for sbatch, srun, scontrol, qsub, mpiexec and ssh, as programs in a folder of the path.

A job runs in the foreground, on this machine, as two "nodes". sbatch sends its script USR1, and the clock of a PBS
script jumps, when the run has made STANDIN_STEPS more steps; a job that is queued again is run once more.
"""

import os
import pathlib
import sys

COMMON = r"""
import json, os, pathlib, re, signal, subprocess, sys, time
STATE = pathlib.Path(os.environ["STANDIN_STATE"])


def steps():
    file = pathlib.Path(os.environ["STANDIN_METRICS"])
    return file.read_text().count('"loss"') if file.exists() else 0


def start_nodes(words, count, variables):
    nodes = [subprocess.Popen(words, env=os.environ | variables(rank)) for rank in range(count)]

    def forward(number, frame):
        for node in nodes:
            if node.poll() is None:
                node.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)
    while any(node.poll() is None for node in nodes):
        time.sleep(0.1)
        if any(node.poll() for node in nodes):
            time.sleep(5)
            for node in nodes:
                if node.poll() is None:
                    node.terminate()
    sys.exit(max(128 - node.returncode if node.returncode < 0 else node.returncode for node in nodes))


def run_job(script, variables, at_the_limit):
    for attempt in range(2):
        again = STATE / "again"
        again.unlink(missing_ok=True)
        began = steps()
        job = subprocess.Popen(["bash", script], env=os.environ | variables | {"ATTEMPT": str(attempt)})
        told = False
        while job.poll() is None:
            time.sleep(0.05)
            if not told and steps() >= began + int(os.environ["STANDIN_STEPS"]):
                told = True
                at_the_limit(job)
        with open(STATE / "jobs", "a") as file:
            file.write(f"{job.returncode} {'again' if again.exists() else 'done'}\n")
        if not again.exists():
            break
    sys.exit(job.returncode)
"""
SBATCH = r"""
script = sys.argv[-1]
text = pathlib.Path(script).read_text()
options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
number = options.get("signal")
assert number is None or re.fullmatch(r"B:USR1@\d+", number), number
print("Submitted batch job 4242", flush=True)
job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": options["nodes"], "SLURM_JOB_NODELIST": "localhost",
       "SLURM_NTASKS": options["nodes"], "SLURM_PROCID": "0"}
run_job(script, job, lambda job: job.send_signal(signal.SIGUSR1) if number else None)
"""
SRUN = r"""
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[1:]
count = int(os.environ["SLURM_JOB_NUM_NODES"])
step = {"SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NUM_NODES": str(count), "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{count})", "SLURM_LOCALID": "0"}
start_nodes(words, count, lambda rank: step | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)})
"""
SCONTROL = r"""
assert sys.argv[1:] == ["requeue", "4242"], sys.argv
(STATE / "again").touch()
"""
QSUB = r"""
script = sys.argv[-1]
if "PBS_JOBID" in os.environ:
    (STATE / "again").touch()
    sys.exit(0)
text = pathlib.Path(script).read_text()
for line in (r"-l select=\d+", r"-l walltime=\d\d:\d\d:\d\d$"):
    assert re.search("^#PBS " + line, text, re.MULTILINE), line
clock, nodes, spooled = STATE / "clock", STATE / "nodes", STATE / "spooled"
nodes.write_text("localhost\n127.0.0.1\n")
# A job runs a copy of its script; its clock is this file.
read_clock = f"$(cat {clock} 2>/dev/null || echo 0)"
spooled.write_text(f"trap 'rm -f {clock}' EXIT\n" + text.replace("SECONDS", read_clock))
print("77.pbs", flush=True)
run_job(str(spooled), {"PBS_JOBID": "77.pbs", "PBS_NODEFILE": str(nodes)}, lambda job: clock.write_text("999999"))
"""
MPIEXEC = r"""
words = sys.argv[1:]
assert words[:1] == ["-n"] and words[2:4] == ["-ppn", "1"], words
count = int(words[1])
start_nodes(words[4:], count, lambda rank: {"PMI_RANK": str(rank), "PMI_SIZE": str(count), "MPI_LOCALRANKID": "0",
                                            "MPI_LOCALNRANKS": "1"})
"""
SSH = r"""
words = sys.argv[1:]
assert words[:2] == ["-o", "BatchMode=yes"], words
with open(STATE / "hosts", "a") as file:
    file.write(words[2] + "\n")
os.execvp("bash", ["bash", "-c", " ".join(words[3:])])
"""
PROGRAMS = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "qsub": QSUB, "mpiexec": MPIEXEC, "ssh": SSH}


def install(folder: pathlib.Path, metrics: pathlib.Path, steps: int = 5) -> dict[str, str]:
    """Write the programs into folder/bin; the variables with which they are found and know the run."""
    (folder / "bin").mkdir()
    (folder / "state").mkdir()
    for name, code in PROGRAMS.items():
        file = folder / "bin" / name
        file.write_text(f"#!{sys.executable}\n{COMMON}{code}")
        file.chmod(0o755)
    paths = [str(folder / "bin"), str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    return {
        "PATH": os.pathsep.join(paths), "STANDIN_STATE": str(folder / "state"), "STANDIN_METRICS": str(metrics),
        "STANDIN_STEPS": str(steps),
    }  # fmt: skip
