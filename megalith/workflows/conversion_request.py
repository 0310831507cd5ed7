"""What `megalith checkpoint import`, `export` or `reshape` is asked to do, judged before anything is read. No torch."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from megalith.common.errors import problem
from megalith.common.extras import missing_package
from megalith.config.flags.text import Words, fail, flag
from megalith.config.flags.values import convert as convert_value
from megalith.config.flags.values import fields

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"} | {
    name: name for name in ("float32", "bfloat16", "float16")
}
INTEGERS = {"data_parallel_size": "--data-parallel-size", "iteration": "--ckpt-step"}  # option -> its flag
UNCONVERTED = (  # options that are taken as they were typed
    "qkv_layout",
    "swiglu_order",
    "replicas",
    "safetensors",
    "architecture",
    "with_optimizer",
    "adapter",
)
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "use_distributed_optimizer",
    "make_vocab_size_divisible_by",
)


@dataclasses.dataclass(frozen=True)
class ConversionRequest:
    """One conversion. options: {name: value}, see checkpoint/formats/options.py. notes: the lines printed first."""

    verb: str
    source: str
    folder: pathlib.Path
    to: str
    format: str | None
    options: dict[str, Any]
    overwrite: bool
    sha256: str | None
    verify: bool
    print_structure: bool
    notes: tuple[str, ...]

    @property
    def writes_optimizer(self) -> bool:
        """Whether the optimizer's tensors are written too, and not the model's alone."""
        return self.to == "megalith" or (self.to == "megatron" and bool(self.options.get("with_optimizer")))


def read(
    verb: str, values: dict[str, Any], words: Sequence[str], problems: list[str], notice: Callable[[str], None]
) -> ConversionRequest:
    """The request that flags and words make. problems: those found so far.

    Raises ConfigError with all problems, before any file is opened.
    """
    values = dict(values)
    paths = [values.pop(name) for name in ("source", "folder") if name in values] + list(words)
    if len(paths) != 2:
        command = f"megalith checkpoint {verb}"
        rule = "takes two paths, where to read and where to write"
        problems.append(problem(command, paths, rule, f"Write {command} SOURCE FOLDER"))
    to = values.pop("to", {"import": "megalith", "reshape": "megatron"}.get(verb))
    if to is None and any(name in LAYOUT or name == "data_parallel_size" for name in values):
        to = "megatron"  # as transformers' converter does where no other format is named
    if to is None:
        rule = "must name the format to write"
        problems.append(problem("--to", Words("nothing"), rule, "Write --to huggingface, or --to megatron"))
    given = {
        name: values.pop(name)
        for name in ("from", "overwrite", "sha256", "verify", "print_structure")
        if name in values
    }
    options = _options(values, verb, problems, notice)
    if given.get("verify") and (missing := missing_package("transformers", "--verify")):
        problems.append(missing)
    fail(problems)
    request = ConversionRequest(
        verb=verb,
        source=paths[0],
        folder=pathlib.Path(paths[1]),
        to=to,
        format=given.get("from"),
        options=options,
        overwrite="overwrite" in given,
        sha256=given.get("sha256"),
        verify=bool(given.get("verify")),
        print_structure=bool(given.get("print_structure")),
        notes=(),
    )
    return dataclasses.replace(request, notes=tuple(_without_effect(request)))


def _without_effect(request: ConversionRequest) -> list[str]:
    """A note for each flag of the optimizer's layout where no optimizer is written."""
    if request.writes_optimizer:
        return []
    cure = "--with-optimizer" + " --to megatron" * (request.to != "megatron")
    defaults = {"use_distributed_optimizer": False, "data_parallel_size": 1}
    return [
        f"{flag(name)} has no effect without {cure}"
        for name, default in defaults.items()
        if request.options.get(name, default) != default
    ]


def _options(values: dict[str, Any], verb: str, problems: list[str], notice: Callable[[str], None]) -> dict[str, Any]:
    """Options from values as typed; the rest are fields of the config, and become its `overrides`."""
    options = {name: values.pop(name) for name in UNCONVERTED if name in values}
    for name, spelling in INTEGERS.items():
        if name in values:
            options[name] = _integer(spelling, values.pop(name), problems)
    if "dtype" in values:
        options["dtype"] = DTYPES.get(typed := values.pop("dtype"))
        if options["dtype"] is None:
            rule = f"must be one of {', '.join(DTYPES)}"
            problems.append(problem("--dtype", typed, rule, "Write --dtype bfloat16"))
    if "max_shard_size" in values:
        options["max_shard_size"] = parse_size(values.pop("max_shard_size"), problems)
    name = values.pop("tokenizer_name", None)
    if name is not None and pathlib.Path(name).is_dir():
        values["tokenizer"] = name
    elif name is not None:
        notice(
            f"--tokenizer-name {name} is no folder, and nothing is downloaded by name: "
            "add tokenizer files with --tokenizer FOLDER"
        )
    if "tokenizer" in values:
        options["tokenizer"] = pathlib.Path(values.pop("tokenizer"))
        if not options["tokenizer"].is_dir():
            rule = "must be a folder with tokenizer.json, or with vocab.json and merges.txt"
            cure = "Name a folder on this machine: nothing is downloaded by name"
            problems.append(problem("--tokenizer", str(options["tokenizer"]), rule, cure))
    overrides = {}
    for name, typed in values.items():
        value, field_problem = convert_value(fields()[name], typed, flag(name))
        if field_problem:
            problems.append(field_problem.text)
        elif verb != "import" and name in LAYOUT:
            options[name] = value
        else:
            overrides[name] = value
    return {**options, "overrides": overrides}


def _integer(name: str, text: str, problems: list[str]) -> int | None:
    if re.fullmatch(r"\d+", text):
        return int(text)
    problems.append(problem(name, text, "must be a whole number", f"Write {name} 1"))
    return None


def parse_size(text: str, problems: list[str]) -> int | None:
    """Bytes of a size such as 200MB or 2GiB; None, and a problem added, where it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", text.upper())
    if match and float(match[1]) > 0:
        return int(float(match[1]) * UNITS[match[2] or ""])
    rule = "must be a size such as 200MB, 5GB or 2GiB"
    problems.append(problem("--max-shard-size", text, rule, "Write --max-shard-size 5GB"))
    return None
