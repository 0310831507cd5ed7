"""What is wrong with the options of a MegatronLMPlugin, each alone and all together, before there is a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megalith.common import environment
from megalith.common.errors import problem
from megalith.config.checks.checks import recompute_problems, violated_limit
from megalith.config.checks.model import form_problems
from megalith.config.checks.parallel import micro_batch_problems, parallel_problems
from megalith.config.checks.schedule import schedule_problems
from megalith.config.flags.text import Problem, Words
from megalith.config.flags.values import fields
from megalith.config.megatron.flags import NO_EXPERTS
from megalith.config.run import RunConfig
from megalith.config.sections.data import DataConfig, missing_tokenizer_files
from megalith.integrations.accelerate.options.megatron_args import MegatronArgs, for_indexed_alone, without_dashes

if TYPE_CHECKING:
    from megalith.integrations.accelerate.plugin import MegatronLMPlugin

OF_WEIGHT_DECAY = ("weight_decay_incr_style", "start_weight_decay", "end_weight_decay")
TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {  # type of an option -> whether a value has it, in words
    "int": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "float": (lambda value: not isinstance(value, (bool, str)) and number(value) is not None, "a finite number"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "str": (lambda value: isinstance(value, str), "text"),
    "list": (
        lambda value: isinstance(value, (list, tuple)) and len(value) <= 3
        and all(isinstance(each, int) and each >= 0 for each in value),
        "a list of up to three numbers of samples: of training, validation and test",
    ),
    "dict": (lambda value: isinstance(value, Mapping), "a dict"),
    "type": (lambda value: isinstance(value, type), "a class"),
    "Callable": (callable, "a function"),
}  # fmt: skip


def options(plugin: MegatronLMPlugin) -> dict[str, dataclasses.Field]:
    """The fields that a script may give, by name, without other spellings of them."""
    return {each.name: each for each in dataclasses.fields(plugin) if each.metadata}


def kind_of(field: dataclasses.Field) -> str:
    """int, float, bool, str, list, dict, type or Callable: the type of an option."""
    return str(field.type).partition(" | ")[0].partition("[")[0]


def number(value: Any) -> float | None:
    """A value or text as a finite number; None where it is none."""
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (TypeError, ValueError):
        return None


def find_problems(plugin: MegatronLMPlugin) -> list[str]:
    """All that cannot work, a message each."""
    found, wrong = list[str](), set[str]()
    for name, field in options(plugin).items():
        if violated := _violated(field, getattr(plugin, name)):
            source = _source(plugin, name)
            found.append(problem(name, getattr(plugin, name), *violated) + source)
            wrong |= {name, field.metadata["run"]}
    args = plugin.args()
    return [*found, *args.problems, *_rules(plugin, args, wrong), *_together(plugin, wrong)]


def is_of_schedule(name: str) -> bool:
    """Whether a field of RunConfig is about the learning rate or the weight decay over time."""
    return fields()[name].section == "schedule" or name in ("min_lr", *OF_WEIGHT_DECAY)


def data_notices(plugin: MegatronLMPlugin, args: MegatronArgs) -> list[str]:
    """A line for each argument that only indexed datasets read, where there are none."""
    names = [] if plugin.megatron_dataset_flag else for_indexed_alone(args.values)
    return [f"other_megatron_args: {name} has no effect: only indexed datasets read it" for name in names]


def plugin_names(plugin: MegatronLMPlugin) -> dict[str, str]:
    """{field of RunConfig: the option that sets it}."""
    return {each.metadata["run"]: name for name, each in options(plugin).items() if each.metadata["run"]}


def in_plugin_words(plugin: MegatronLMPlugin, each: Problem, names: Mapping[str, str] | None = None) -> str:
    """A problem of a RunConfig, in terms of the plugin's options. names: further names of fields."""
    called = plugin_names(plugin)
    sources = "".join(_source(plugin, called[name]) for name in each.fields if name in called)
    return without_dashes(each.text, called | dict(names or {})) + sources


def _source(plugin: MegatronLMPlugin, name: str) -> str:
    """Where an option comes from, unless from the script itself."""
    from_environment = name in plugin.from_environment
    return f" ({name} is from the environment variable MEGATRON_LM_{name.upper()}.)" if from_environment else ""


def _violated(field: dataclasses.Field, value: Any) -> tuple[str, str] | None:
    """(rule, cure) of a value that its option cannot have by itself; None where it can."""
    otherwise = field.default if field.default is not None else field.metadata["otherwise"]
    if value is None:
        return None if otherwise is None else ("must have a value", f"Write {field.name}={otherwise!r}")
    if run := field.metadata["run"]:
        if run == "attention_backend" and environment.truth(str(value)) is not None:
            return None
        if (found := violated_limit(run, value)) is None:
            return None
        return without_dashes(found[0], {run: field.name}), without_dashes(found[1], {run: field.name})
    fits, words = TYPES[kind_of(field)]
    if not fits(value):
        return f"must be {words} ({field.metadata['help']})", f"Write such a value, or leave {field.name} out"
    least = field.metadata["least"]
    if least is not None and value < least:
        return f"must be at least {least}", f"Write {field.name}={least} or more"
    return None


def _rules(plugin: MegatronLMPlugin, args: MegatronArgs, wrong: set[str]) -> Iterator[str]:
    """What two options, or an option and an argument, cannot say together."""
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        if name not in wrong and getattr(plugin, name) > 1:
            cure = NO_EXPERTS[0].upper() + NO_EXPERTS[1:]
            yield problem(name, getattr(plugin, name), "must be 1", cure) + _source(plugin, name)
    for run, name in plugin_names(plugin).items():
        said = getattr(plugin, name)
        if name not in wrong and said is not None and args.values.get(run, said) != said:
            rule = f"must be {name}, {said!r}, because it is the same"
            yield problem(f"other_megatron_args: {run}", args.values[run], rule, f"Write {name} alone")
    sharding = args.values.get("data_parallel_sharding", "full")
    if plugin.use_custom_fsdp and sharding != "full":
        rule = "must be full with use_custom_fsdp=True"
        yield problem("other_megatron_args: data_parallel_sharding", sharding, rule, "Leave out one of the two")
    data = {name: value for name, value in args.values.items() if fields()[name].section == "data"}
    missing = missing_tokenizer_files(DataConfig(**data))
    if data.get("merge_file") and not data.get("tokenizer_type") and not data.get("vocab_file"):
        missing = ["vocab_file"]
    for name in missing:
        kind = data.get("tokenizer_type") or "GPT2BPETokenizer"
        rule, cure = f"must be given, because {kind} is made from it", f"Add {name!r}: FILE to other_megatron_args"
        yield problem(f"other_megatron_args: {name}", Words("nothing"), rule, cure)


def _together(plugin: MegatronLMPlugin, wrong: set[str]) -> Iterator[str]:
    """Rules of a RunConfig that hold for any model and number of processes.

    The model is not known yet. One with enough layers stands in for it, and what is about fields that it alone has is
    left out.
    """
    given = {name: value for name, value in plugin.run_fields().items() if name not in wrong}
    stages = given.get("pipeline_model_parallel_size", 1)
    layers = 2 * stages * given.get("num_layers_per_virtual_pipeline_stage", 1)
    config = RunConfig().replace(**{"num_layers": layers, "skip_train": True, "micro_batch_size": 1} | given)
    found = [
        *form_problems(config), *parallel_problems(config, config.parallel.least_processes),
        *recompute_problems(config), *schedule_problems(config),
    ]  # fmt: skip
    for each in found:
        of_model = {name for name in each.fields if fields()[name].section == "model"}
        if of_model <= given.keys() and "global_batch_size" not in each.fields:
            yield in_plugin_words(plugin, each)
    if not wrong & {"num_micro_batches", "pipeline_model_parallel_size"}:
        for each in micro_batch_problems(config, plugin.num_micro_batches, 1):
            yield in_plugin_words(plugin, each, {"global_batch_size": "num_micro_batches"})
