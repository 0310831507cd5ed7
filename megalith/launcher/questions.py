"""The questions of `accelerate config`, in the order of Accelerate's guide to Megatron-LM and with its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.common.errors import ConfigError, problem
from megalith.common.questions import Questions
from megalith.config.flags.text import Words
from megalith.launcher.accelerate_config import REFUSED_TYPES, AccelerateConfig

MACHINES = ("NO", "MULTI_CPU", "MULTI_GPU", "XLA")
NAMES = {"NO": "one process", "MULTI_CPU": "multi-CPU", "MULTI_GPU": "multi-GPU", "XLA": "TPU"}


def ask() -> AccelerateConfig:
    """Ask everything; what cannot work is asked again.

    Raises ConfigError where the input ends before a question that has no default.
    """
    questions = Questions()
    _number(questions, "compute environment", ("this machine", "AWS (Amazon SageMaker)"), {1: "start it there"})
    kind = MACHINES[
        _number(questions, "type of machine", [NAMES[kind] for kind in MACHINES], {3: REFUSED_TYPES["XLA"]})
    ]
    values: dict[str, Any] = {"distributed_type": kind, "num_processes": 1, "use_cpu": kind == "MULTI_CPU"}
    if kind == "NO":
        values["use_cpu"] = questions.yes("use the CPU only, whatever devices there are", False)
    else:
        values |= _machines(questions)
        if kind == "MULTI_GPU":
            for library, name in (("DEEPSPEED", "DeepSpeed"), ("FSDP", "FullyShardedDataParallel")):
                while questions.yes(f"use {name}", False):
                    print(f"  {name} is not started here. {REFUSED_TYPES[library]}.")
        if questions.yes("use Megatron-LM", False):
            values |= {"distributed_type": "MEGATRON_LM", **_megatron(questions)}
        values["num_processes"] = _processes(questions, kind, values)
    values["mixed_precision"] = questions.choice("mixed precision", ("no", "fp16", "bf16"), "no")
    return AccelerateConfig(**values)


def _number(
    questions: Questions, question: str, answers: list[str] | tuple[str, ...], refused: Mapping[int, str]
) -> int:
    """The number of one of several answers, that may be typed as well; refused: number -> what is said to it."""
    shown = ", ".join(f"[{number}] {answer}" for number, answer in enumerate(answers))
    while True:
        text = questions.text(f"{question} ({shown})", "0")
        known = [number for number, answer in enumerate(answers) if text.lower() in (str(number), answer.lower())]
        if known and known[0] not in refused:
            return known[0]
        last = len(answers) - 1
        print(f"  not here: {refused[known[0]]}" if known else f"  the answer must be from 0 to {last}; found {text!r}")


def _machines(questions: Questions) -> dict[str, Any]:
    number = questions.number("number of machines", 1)
    if number == 1:
        return {}
    while not 0 <= (rank := _whole(questions.text("number of this machine, counted from 0", "0"))) < number:
        print(f"  the number of this machine must be from 0 to {number - 1}")
    while not (address := questions.text("address of machine 0")):
        if questions.ended:
            rule, cure = "must be given, where several machines meet", "Answer with its name or IP address"
            raise ConfigError(problem("The address of machine 0", Words("nothing"), rule, cure))
        print("  all machines need it, to meet there")
    while not 0 < (port := _whole(questions.text("port of machine 0", "29500"))) < 65536:
        print("  the port must be a whole number from 1 to 65535")
    found = {"num_machines": number, "machine_rank": rank, "main_process_ip": address, "main_process_port": port}
    if not questions.yes("all machines are on one local network", True):
        found["rdzv_backend"] = questions.text("way in which machines meet (static, c10d, ...)", "static")
    return found


def _whole(text: str) -> int:
    """The whole number of a text; -1 for another text."""
    return int(text) if text.isdecimal() else -1


def _megatron(questions: Questions) -> dict[str, Any]:
    found: dict[str, Any] = {"tp_degree": questions.number("tensor parallelism, degree", 1)}
    if found["tp_degree"] > 1:
        found["sequence_parallelism"] = questions.yes("sequence parallelism", True)
    found["pp_degree"] = questions.number("pipeline parallelism, degree", 1)
    if found["pp_degree"] > 1:
        found["num_micro_batches"] = questions.number("number of micro-batches", 1)
    found["recompute_activations"] = questions.yes("selective activation recomputation", True)
    found["use_distributed_optimizer"] = questions.yes("distributed optimizer, sharded over data parallelism", True)
    found["gradient_clipping"] = questions.real("gradient clipping by the global L2 norm (0: none)", 1.0)
    return {f"megatron_lm_{name}": value for name, value in found.items()}


def _processes(questions: Questions, kind: str, values: Mapping[str, Any]) -> int:
    """A number of processes that machines and model-parallel processes divide; the default is the smallest."""
    one = AccelerateConfig(**{**values, "num_processes": None})
    name = "GPU(s)" if kind == "MULTI_GPU" else "processes"
    while True:
        number = questions.number(f"number of {name} on all machines together", one.processes)
        if number % one.processes == 0:
            return number
        print(f"  it must be a multiple of {one.processes} (of the machines, and of tp x pp); found {number}")
