"""A script with megalith.accelerate, started by `accelerate launch` in each of its ways, and by `megalith launch`."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.toy import ROOT

SCRIPT = """\
import json, sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from megalith.accelerate import Accelerator
from megalith.accelerate.utils import MegatronLMPlugin

plugin = MegatronLMPlugin(tp_degree=int(sys.argv[1])) if len(sys.argv) > 1 else None
accelerator = Accelerator(megatron_lm_plugin=plugin)
torch.manual_seed(0)
config = GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
model = GPT2LMHeadModel(config)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(96, (8, 16))]
loader = torch.utils.data.DataLoader(rows, batch_size=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses = []
for batch in loader:
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
with open(f"rank{accelerator.process_index}.json", "w") as file:
    json.dump([str(accelerator.distributed_type), accelerator.num_processes, losses], file)
"""
# Starts processes with the variables of Open MPI, which need not be installed.
MPIRUN = f"""\
#!{sys.executable}
import os, subprocess, sys
if "--version" in sys.argv:
    print("mpirun (Open MPI) 4.1.6")
    sys.exit()
number = int(sys.argv[sys.argv.index("-n") + 1])
command = sys.argv[sys.argv.index("--bind-to") + 2 :]
started = []
for rank in range(number):
    names = {{"RANK": rank, "SIZE": number, "LOCAL_RANK": rank, "LOCAL_SIZE": number}}
    variables = {{f"OMPI_COMM_WORLD_{{name}}": str(value) for name, value in names.items()}}
    started.append(subprocess.Popen(command, env=os.environ | variables))
sys.exit(max(process.wait() for process in started))
"""
FILE = """\
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
num_processes: 2
num_machines: 1
machine_rank: 0
main_process_port: {port}
mixed_precision: 'no'
use_cpu: true
"""
MPI = "mpirun_config: {mpirun_hostfile: hosts}\n"
MEGATRON = "megatron_lm_config: {megatron_lm_tp_degree: 2, megatron_lm_sequence_parallelism: true}\n"
LAUNCHES = {  # name -> (command, kind of the file and its last lines, tp_degree in the script, processes)
    "accelerate, one process": (["accelerate", "launch", "--cpu", "--num_processes", "2"], None, ["1"], 1),
    "accelerate, mpirun": (["accelerate", "launch", "--config_file", "file.yaml"], ("MULTI_CPU", MPI), ["2"], 2),
    "accelerate, torchrun": (["accelerate", "launch", "--config_file", "file.yaml"], ("MULTI_GPU", ""), ["2"], 2),
    "megalith, plugin in code": (["megalith", "launch", "--config_file", "file.yaml"], ("MULTI_CPU", ""), ["2"], 2),
    "megalith, plugin of the file": (
        ["megalith", "launch", "--config_file", "file.yaml"],
        ("MEGATRON_LM", MEGATRON),
        [],
        2,
    ),
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_launcher_trains_the_same(tmp_path):
    """`accelerate launch --cpu` starts one process whatever --num_processes says, unless a file names mpirun's hosts.

    The batch is that of one process in every layout here, so the losses are equal.
    """
    losses = {}
    for name, (command, config, degree, processes) in LAUNCHES.items():
        folder = tmp_path / name.replace(" ", "_")
        (folder / "bin").mkdir(parents=True)
        (folder / "script.py").write_text(SCRIPT)
        (folder / "bin" / "mpirun").write_text(MPIRUN)
        (folder / "bin" / "mpirun").chmod(0o755)
        if config:
            (folder / "file.yaml").write_text(FILE.format(kind=config[0], port=free_port()) + config[1])
        run([*command, "script.py", *degree], folder)
        found = [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]
        assert len(found) == processes, name
        for kind, number, each in found:
            assert "MEGATRON_LM" in kind and number == processes and each == pytest.approx(found[0][2], rel=1e-6), name
        losses[name] = found[0][2]
    first, *others = losses.values()
    assert len(first) == 2 and first[1] < first[0] + 1
    for each in others:
        assert each == pytest.approx(first, rel=1e-5)


def run(command, folder):
    """Run it as a user would, with this Python's scripts and the folder's mpirun on the path."""
    module = {"accelerate": "accelerate.commands.accelerate_cli", "megalith": "megalith"}[command[0]]
    left_out = ("ACCELERATE_", "MEGATRON_LM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    path = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"
    environment |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
    environment["ACCELERATE_USE_CPU"] = "true"  # also where there is a GPU
    done = subprocess.run(
        [sys.executable, "-m", module, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
