"""megalith launch: a verb of megalith or a script in any number of processes, on one machine or a cluster's nodes.

A script with no flag of nodes or jobs is started as `accelerate launch` starts it.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from megalith.cli import launch_verb
from megalith.common import environment
from megalith.config.flags import flags
from megalith.config.flags.flags import VALUE, CommandLine, Flag
from megalith.config.flags.text import Problem, flag
from megalith.config.flags.values import Field
from megalith.launcher import accelerate_yaml, local
from megalith.launcher.accelerate_config import ITSELF, REFUSED_TYPES, keys, typed
from megalith.launcher.local import LaunchOptions, launch_options
from megalith.launcher.options import job_options, node_options

EXAMPLE = """\
examples:
  megalith launch pretrain gpt --config run.yaml                   one process for each accelerator of this machine
  megalith launch --nproc-per-node 2 pretrain gpt --config run.yaml
  megalith launch --nnodes 2 --node-rank 0 --rdzv-endpoint node0:29500 pretrain gpt --config run.yaml
  srun megalith launch pretrain gpt --config run.yaml              (mpiexec too)
  megalith launch --slurm --nnodes 2 --nproc-per-node 8 --time 4:00:00 --submit pretrain gpt --config run.yaml
  megalith launch --hostfile hosts.txt pretrain gpt --config run.yaml
  megalith launch --config_file megatron_gpt_config.yaml train.py --learning_rate 5e-5
  megalith launch --num_processes 4 --use_megatron_lm --megatron_lm_tp_degree 2 --megatron_lm_pp_degree 2 train.py
  megalith launch --cpu --num_processes 2 -m megalith pretrain gpt --config run.yaml

All after the verb or script is its own. Flags are written with - or _. A script is started as by Accelerate, unless a
flag of nodes or jobs is given: flags override the file, which is that of --config_file, or else the one that
`accelerate config` wrote. `megalith config --accelerate` writes such a file. On several machines the same command is
given on each, with its own --machine_rank (for a verb, --node-rank).

The exit status is that of the process that failed first. SIGTERM, SIGUSR1 or Ctrl-C reach the processes, so that a run
saves; a second one ends them.
"""
VERB = (
    Flag("--config-file", {"config_file": VALUE}, help="YAML of accelerate config"),
    Flag("--dry-run", {"dry_run": True}, 0, help="print the command and its environment variables, and start nothing"),
    Flag("--help", {"help": True}, 0),
    Flag("-h", {"help": True}, 0),
)
CHOSEN = (
    Flag("--cpu", {"use_cpu": True}, 0, help="train on the CPU"),
    Flag("--multi-gpu", {"distributed_type": "MULTI_GPU"}, 0, help="processes each have the whole model"),
    Flag("--use-megatron-lm", {"distributed_type": "MEGATRON_LM"}, 0, help="split the model by megalith.accelerate"),
)
OTHER_SPELLINGS = (
    Flag("-m", {"module": True}, 0),
    Flag("-t", {"tee": VALUE}),
    Flag("--fp16", {"mixed_precision": "fp16"}, 0, notice="--fp16 is read as --mixed-precision fp16"),
    Flag(
        "--megatron-lm-recompute-activation",
        {"megatron_lm_recompute_activations": VALUE},
        notice="--megatron-lm-recompute-activation is read as --megatron-lm-recompute-activations",
    ),
)
NOT_STARTED = {  # flags of accelerate launch and torchrun that are not taken here -> what to do instead
    "use_deepspeed": REFUSED_TYPES["DEEPSPEED"],
    "use_fsdp": REFUSED_TYPES["FSDP"],
    "use_parallelism_config": "write --use_megatron_lm with --megatron_lm_tp_degree and --megatron_lm_pp_degree",
    "tpu": REFUSED_TYPES["XLA"],
    "gradient_clipping": "it is --megatron_lm_gradient_clipping here",
    "zero_stage": "write --megatron_lm_use_distributed_optimizer true, or " + ITSELF,
    "mpirun_hostfile": "give this command on each machine, with its --machine_rank",
    "master_addr": "it is --main_process_ip here; for a verb, --rdzv-endpoint HOST:PORT",
    "master_port": "it is --main_process_port here; for a verb, --rdzv-endpoint HOST:PORT",
}
SWITCHES = ("use_deepspeed", "use_fsdp", "use_parallelism_config", "tpu")  # those without a value
WITHOUT_EFFECT = {  # flags of accelerate launch that do nothing here -> (values they take, why)
    "same_network": (0, accelerate_yaml.WITHOUT_EFFECT["same_network"][1]),
    "main_training_function": (1, accelerate_yaml.WITHOUT_EFFECT["main_training_function"][1]),
    "downcast_bf16": (0, accelerate_yaml.ON_TPU),
    "quiet": (0, "megalith prints nothing after the script's own messages"),
}
NO_FLAG = ("compute_environment", "distributed_type", "use_cpu")  # fields that CHOSEN sets, or nothing


def _of_fields(fields: Iterable[Field]) -> list[Flag]:
    """A flag for each field; those of Megatron-LM that are true or false take the word, as in accelerate launch."""
    found = []
    for field in fields:
        switch = field.kind is bool and not field.name.startswith("megatron_lm_")
        if field.default is True:  # a switch that is on
            found.append(
                Flag(f"--no-{flag(field.name)[2:]}", {field.name: False}, 0, help=f"not: {field.metadata['help']}")
            )
            continue
        choices = field.metadata["choices"]
        about = field.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        sets, number = {field.name: True if switch else VALUE}, field.kind in (int, float)
        found.append(Flag(flag(field.name), sets, 0 if switch else 1, help=about, number=number))
        found += [Flag(name, sets, 0 if switch else 1) for name in field.metadata["flags"]]
    return found


def _groups() -> dict[str, list[Flag]]:
    """Title in --help -> flags."""
    given = [field for field in keys().values() if field.name not in NO_FLAG]
    megatron = [field for field in given if field.name.startswith("megatron_lm_")]
    return {
        "this command": list(VERB[:2]),
        "processes": [*CHOSEN, *_of_fields(field for field in given if field not in megatron)],
        "Megatron-LM (with --use-megatron-lm, or a file that says so)": _of_fields(megatron),
        "start": _of_fields(launch_options().values()),
        "a verb, or a script without Accelerate: processes and nodes": _of_fields(node_options().values()),
        "a job of a cluster": _of_fields(job_options().values()),
    }


def _table() -> dict[str, Flag]:
    found = [each for group in _groups().values() for each in group] + [*VERB, *OTHER_SPELLINGS]
    found += [Flag(flag(name), {}, int(name not in SWITCHES), refused=cure) for name, cure in NOT_STARTED.items()]
    for name, (values, why) in WITHOUT_EFFECT.items():
        found.append(Flag(flag(name), {}, values, notice=f"{flag(name)} has no effect here: {why}"))
    return {each.name: each for each in found}


def _read(words: Sequence[str]) -> CommandLine:
    return flags.read_against(_table(), words, verb="launch", until_word=True)


def _own(words: Sequence[str]) -> list[str]:
    """The words before the script."""
    return list(words[: len(words) - len(_read(words).words)])


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "launch",
        help="start a verb or a script, in any number of processes, on one machine or a cluster",
        usage="megalith launch [--FLAG VALUE ...] VERB [ARGS ...]\n       megalith launch [--config_file FILE] "
        "[--num_processes N] [--FLAG VALUE ...] SCRIPT [ARGS ...]",
        description="Start a verb of megalith, or a script, in one process or several: here, on several machines, or "
        "as the job of a cluster.",
        epilog=EXAMPLE,
    )
    for title, group in _groups().items():
        flags.add_command_help(parser, group, title)
    parser.set_defaults(handler=launch, reads=_read, own=_own)


def launch(args: argparse.Namespace) -> int:
    """Check all that is given, and start it; with --dry-run print what would start."""
    reading: CommandLine = args.reading
    if launch_verb.is_meant(reading):
        return launch_verb.launch(reading)
    file = reading.values.get("config_file")
    if file is None and (default := environment.accelerate_config_file()).is_file():
        file = default
        reading.notices.insert(0, f"configuration of {default}; --config_file names another")
    values: dict[str, Any] = {}
    for name, field in launch_options().items():
        if name in reading.values:
            values[name], failure = typed(field, reading.values[name], flag(name))
            reading.problems += [failure] if failure else []
    options = LaunchOptions(**{name: value for name, value in values.items() if value is not None})
    if reading.words or not reading.problems:  # else the script may have been taken for the value of a mistyped flag
        text = local.script_problem(options, reading.words)
        reading.problems += [Problem((), text)] if text else []
    config, lines = accelerate_yaml.resolve(file and pathlib.Path(file), reading)
    local.check_port(config)
    words = local.command(config, options, reading.words)
    added, more = local.environment(config, options)
    for line in [*lines, *more]:
        print(f"megalith: {line}", file=sys.stderr)
    if reading.values.get("dry_run"):
        print(local.text(words, added))
        return 0
    local.start(words, added)
