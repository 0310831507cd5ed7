"""The YAML of `accelerate config`, of Accelerate 0.14 to 1.15, read and written.

Every key acts, prints a line that says why it does nothing here, or is an error that says what to write instead.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.flags import CommandLine
from megalith.config.flags.text import Problem, Words, fail, flag, nearest
from megalith.config.flags.yaml_text import load_yaml
from megalith.launcher.accelerate_config import ITSELF, AccelerateConfig, find_problems, keys, notices, typed

PREFIXES = {"megatron_lm_config": "megatron_lm_", "dynamo_config": "dynamo_"}  # section -> what its keys begin with
RENAMED = {"megatron_lm_recompute_activation": "megatron_lm_recompute_activations"}
REFUSED = {  # section that must be empty -> (what alone reads it, what to do instead)
    "deepspeed_config": ("DEEPSPEED", "Leave it out; megatron_lm_use_distributed_optimizer: true shards as ZeRO does"),
    "fsdp_config": ("FSDP", "Leave it out; megatron_lm_use_custom_fsdp: true shards parameters too"),
    "parallelism_config": (
        "FSDP",
        "Leave it out; megatron_lm_config has megatron_lm_tp_degree, megatron_lm_pp_degree and "
        "megatron_lm_context_parallel_size",
    ),
    "mpirun_config": ("mpirun", "Leave it out, and give this command on each machine with its --machine_rank"),
    "fp8_config": ("mixed_precision fp8", f"Leave it out and write mixed_precision: bf16, or {ITSELF}"),
}
ON_TPU = "it is for TPUs"
WITHOUT_EFFECT: dict[str, tuple[tuple, str]] = {  # key -> (values that say nothing, why others do nothing)
    "downcast_bf16": ((False, "no"), ON_TPU),
    "main_training_function": (("main",), f"{ON_TPU}; elsewhere the script is run from its first line"),
    "same_network": ((True,), "machines meet at main_process_ip, on one network or several"),
    "tpu_name": ((), ON_TPU),
    "tpu_zone": ((), ON_TPU),
    "tpu_use_cluster": ((False,), ON_TPU),
    "tpu_use_sudo": ((False,), ON_TPU),
    "tpu_vm": (([], [""]), ON_TPU),
    "tpu_env": (([], [""]), ON_TPU),
    "command_file": ((), ON_TPU),
    "commands": (([],), ON_TPU),
    "ipex_config": (({},), "PyTorch needs no extension for Intel's processors"),
    "use_mps_device": ((False,), "the device is the machine's own accelerator unless use_cpu is true"),
}
WRITTEN = {  # keys that every file of the guide has, beside those of AccelerateConfig
    "deepspeed_config": {},
    "downcast_bf16": "no",
    "fsdp_config": {},
    "main_training_function": "main",
    "same_network": True,
}
ALWAYS = (  # keys of AccelerateConfig that every file of the guide has
    "compute_environment", "distributed_type", "machine_rank", "main_process_ip", "main_process_port",
    "mixed_precision", "num_machines", "num_processes", "rdzv_backend", "use_cpu",
)  # fmt: skip


def resolve(file: pathlib.Path | None, given: CommandLine) -> tuple[AccelerateConfig, list[str]]:
    """A checked configuration and the lines to show, from a YAML file and the flags over it.

    Raises ConfigError with every problem of file, flags and their combination.
    """
    problems, lines = list(given.problems), list(given.notices)
    raw: dict[str, tuple[Any, str]] = {}
    if file is not None:
        try:
            raw = _read(file.read_text(encoding="utf-8"), str(file), problems, lines)
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            problems.append(
                Problem(tuple(keys()), str(error) if isinstance(error, ConfigError) else _no_file(file, error))
            )
    raw |= {name: (value, flag(name)) for name, value in given.values.items() if name in keys()}
    values = {}
    for name, (value, called) in raw.items():
        values[name], failure = typed(keys()[name], value, called)
        if failure:
            problems.append(failure)
            del values[name]
    config = AccelerateConfig(**values)
    wrong = {name for each in problems for name in each.fields}
    problems += [each for each in find_problems(config) if not wrong.intersection(each.fields)]
    fail(each.text for each in problems)
    return config, [*lines, *notices(config)]


def _no_file(file: pathlib.Path, error: Exception) -> str:
    why = getattr(error, "strerror", None) or str(error)
    cure = "Correct the path; megalith config --accelerate writes such a file"
    return problem("--config-file", str(file), f"must name a readable YAML file ({why})", cure)


def _read(text: str, source: str, problems: list[Problem], lines: list[str]) -> dict[str, tuple[Any, str]]:
    """(raw value, what to call it) by field of AccelerateConfig."""
    tree = load_yaml(text, source)
    if not isinstance(tree, Mapping) or not tree:
        rule = "must map names to values, as in `num_processes: 4`"
        cure = "Correct the file; megalith config --accelerate writes one"
        problems.append(Problem(tuple(keys()), problem(source, Words("nothing") if tree is None else tree, rule, cure)))
        return {}
    found: dict[str, tuple[Any, str]] = {}
    for key, value in tree.items():
        called = f"{source}: {key}"
        if key in PREFIXES:
            found |= _read_section(key, value, called, problems)
        elif key in REFUSED:
            reader, cure = REFUSED[key]
            if value and str(tree.get("distributed_type")).upper() != reader:
                text = problem(called, value, f"must be empty, because only {reader} reads it", cure)
                problems.append(Problem((), text))
        elif key in WITHOUT_EFFECT:
            quiet, why = WITHOUT_EFFECT[key]
            if value is not None and value not in quiet:
                lines.append(f"{called} has no effect here: {why}")
        elif key == "fp16":  # before there was mixed_precision
            if value:
                found.setdefault("mixed_precision", ("fp16", called))
        elif key in keys() and not str(key).startswith("megatron_lm_"):
            found[key] = (value, called)
        else:
            problems.append(_unknown(str(key), source, [name for name in _top_level() if name not in tree]))
    if tree.get("distributed_type") is None:
        rule = "must be given"
        cure = "Write distributed_type: MEGATRON_LM, or MULTI_GPU, MULTI_CPU or NO"
        meant = any("distributed_type" in each.fields for each in problems)
        problems += [] if meant else [Problem((), problem(f"{source}: distributed_type", Words("nothing"), rule, cure))]
    return {name: pair for name, pair in found.items() if pair[0] is not None}


def _read_section(section: str, value: Any, called: str, problems: list[Problem]) -> dict[str, tuple[Any, str]]:
    """The keys below megatron_lm_config or dynamo_config."""
    prefix = PREFIXES[section]
    known = [name for name in keys() if name.startswith(prefix)]
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        cure = f"Indent its keys below it, as in `  {known[0]}: 2`"
        problems.append(Problem(tuple(known), problem(called, value, "must map names to values", cure)))
        return {}
    found: dict[str, tuple[Any, str]] = {}
    for key, inner in value.items():
        name = RENAMED.get(key, key)
        if section == "dynamo_config" and not str(key).startswith(prefix):
            name = prefix + str(key)  # both are written
        if name in found:
            text = problem(f"{called}.{key}", inner, f"must not be given beside {found[name][1]}", "Keep one")
            problems.append(Problem((name,), text))
        elif name in known:
            found[name] = (inner, f"{called}.{key}")
        else:
            problems.append(_unknown(str(key), called, known))
    return found


def _top_level() -> list[str]:
    fields = [name for name in keys() if not name.startswith(tuple(PREFIXES.values()))]
    return [*fields, *PREFIXES, *REFUSED, *WITHOUT_EFFECT, "dynamo_backend"]


def _unknown(key: str, source: str, known: list[str]) -> Problem:
    section = next((name for name, prefix in PREFIXES.items() if key in keys() and key.startswith(prefix)), None)
    near = nearest(key, known)
    cure = f"Write {near}" if near else "Remove it, or correct it; the keys are those of Accelerate 0.14 to 1.15"
    if section and not source.endswith(section):
        near, cure = None, f"Indent it below {section}"
    return Problem((near,) if near else (), f"{source}: there is no key {key} here. {cure}.")


def to_yaml(config: AccelerateConfig) -> str:
    """The file of a configuration, with the keys and in the order of `accelerate config`."""
    import yaml  # here, because --help does without it

    tree: dict[str, Any] = {**WRITTEN, "megatron_lm_config": {}}
    for name, field in keys().items():
        value = getattr(config, name)
        section = next((section for section, prefix in PREFIXES.items() if name.startswith(prefix)), None)
        if section and value is not None:
            tree.setdefault(section, {})[name] = value
        elif not section and (name in ALWAYS or value != field.default):
            tree[name] = value
    return yaml.safe_dump(tree)
